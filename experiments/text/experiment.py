"""The primary contrasts on text: five arms, ten students, plan-execute with an asymmetric hint.

  python -m experiments.run text --jobs=2

A seed decides the student (its start and the order of its training), prompts and sampling; the
teacher is one. The learning rate of each arm is chosen on two students that appear in no final run,
on problems of the training split, as is where the training of a student stops; the test split,
where no problem is one of training, is looked at only in the final runs.
"""

from experiments.grid import Arm, Experiment

EXPERIMENT = Experiment(
  question=(
    'Does DOPD beat vanilla OPD, and OPD to the hinted teacher, in accuracy without the hint; and '
    'does the hint itself help or harm OPD?'
  ),
  base='configs/study.py',
  models={
    'teacher': 'configs/study_sft.py:model=teacher',
    'student': 'configs/study_sft.py:model=student,seed={seed}',
  },
  arms={
    'opd': Arm('method=opd'),
    'opd_privileged': Arm('method=opd', {'objective.teacher_context': 'privileged'}),
    'self_privileged': Arm('method=sdft'),
    'dopd': Arm('method=dopd'),
    'hint_routing': Arm('method=hint_routing'),
  },
  seeds=tuple(range(10)),
  learning_rates=(2e-4, 5e-4, 1e-3),
  tuning_seeds=(100, 101),
  tuning_changes={
    'data.eval': (
      'task:plan_execute?steps=2&definitions=4&modulus=7&rho=0.5&hint=steps&size=1000&seed=77'
      '&split=train'
    ),
    'evaluation.every': 0,
    'evaluation.teacher': False,
  },
  contrasts=(('dopd', 'opd'), ('dopd', 'opd_privileged'), ('opd_privileged', 'opd')),
)
