"""The paper's Fig. 7: three subjects one after the other, what is kept and what carries over.

  python -m experiments.run continual --jobs=2

50 steps with additions only, 50 with subtractions, 50 with multiplications, under one schedule of
the learning rate, so that the last changes least. Every look measures each of them, and problems of
three steps, that nobody has seen. What is compared are problems that mix the three in one chain.
"""

from experiments import study
from experiments.grid import Arm

EXPERIMENT = study.study(
  'Trained on three subjects one after the other, what does a student forget, and what carries '
  'over to subjects that it has not been trained on?',
  {
    f'{name}_stages': Arm(f'{arm.arg},staged', arm.changes)
    for name, arm in {
      'opd': study.OPD,
      'opd_privileged': study.OPD_PRIVILEGED,
      'dopd': study.DOPD,
      'hint_routing': study.HINT_ROUTING,
    }.items()
  },
  also=tuple(f'eval/accuracy/{name}' for name in ('plus', 'minus', 'times', 'longer')),
  looks=(50, 100, 150),
)
