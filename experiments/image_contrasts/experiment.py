"""The primary contrasts on images: the tiny pair of `configs/vlm.py:smoke`, ten seeds, tuned.

  python -m experiments.run image_contrasts --jobs=2

The pair is the same in all runs; a seed decides pictures and sampling. The learning rate of each
arm is chosen on two seeds that appear in no final run, on pictures of the training split.
"""

from experiments.grid import Arm, Experiment

PRIVILEGED = {'objective.teacher_context': 'privileged'}

EXPERIMENT = Experiment(
  question=(
    'On images with boxes as the hint: does DOPD beat vanilla OPD, and OPD to the hinted teacher, '
    'in accuracy without the hint; and does the hint itself help or harm OPD?'
  ),
  base='configs/vlm.py',
  arms={
    'opd': Arm('smoke,method=opd'),
    'opd_privileged': Arm('smoke,method=opd', PRIVILEGED),
    'dopd': Arm('smoke,method=dopd'),
  },
  seeds=range(10),
  learning_rates=(2e-4, 5e-4, 1e-3),
  tuning_seeds=(100, 101),
  tuning_changes={'data.eval': 'task:digits?size=500&seed=77&split=train', 'evaluation.every': 0},
  contrasts=(('dopd', 'opd'), ('dopd', 'opd_privileged'), ('opd_privileged', 'opd')),
)
