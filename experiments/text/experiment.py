"""The primary contrasts on text: five arms, ten students, plan-execute with an asymmetric hint.

  python -m experiments.run text --jobs=2

A seed decides the student (its start and the order of its training), prompts and sampling; the
teacher is one. The learning rate of each arm is chosen on two students that appear in no final run,
on problems of the training split, as is where the training of a student stops; the test split,
where no problem is one of training, is looked at only in the final runs.
"""

from experiments import study
from experiments.grid import Arm

EXPERIMENT = study.study(
  'Does DOPD beat vanilla OPD, and OPD to the hinted teacher, in accuracy without the hint; and '
  'does the hint itself help or harm OPD?',
  {
    'opd': study.OPD,
    'opd_privileged': study.OPD_PRIVILEGED,
    'self_privileged': Arm('method=sdft'),
    'dopd': study.DOPD,
    'hint_routing': study.HINT_ROUTING,
  },
  seeds=range(10),
  also=('eval/accuracy/longer',),
  contrasts=(('dopd', 'opd'), ('dopd', 'opd_privileged'), ('opd_privileged', 'opd')),
  pool=study.TEXT,
)
