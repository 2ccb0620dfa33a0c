"""DOPD at the rate at which it collapses on images, with HS as it is and with HS to the teacher.

  python -m experiments.run image_collapse --jobs=2

1e-3 is what the tuning of `image_contrasts` chose for DOPD; here both have it, untuned, on its
ten seeds.
"""

from experiments import grid, study
from experiments.grid import Arm

CONTRASTS = grid.load('image_contrasts')
RATE = {'optimizer.learning_rate': 1e-3}

EXPERIMENT = grid.Experiment(
  question='Does sending HS to the teacher end the collapse of DOPD on images at 1e-3?',
  base=CONTRASTS.base,
  arms={
    'dopd': Arm('smoke,method=dopd', RATE),
    'hs_to_teacher_fast': Arm('smoke,method=dopd', study.HS_TO_TEACHER | RATE),
  },
  seeds=CONTRASTS.seeds,
  pool='image_contrasts',
)
