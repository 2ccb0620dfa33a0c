"""The repair that `repairs` proposes, HS sent to the teacher, on images.

  python -m experiments.run image_repair --jobs=2

Tuned as the arms of `image_contrasts` are, with its ten seeds.
"""

import dataclasses

from experiments import grid, study
from experiments.grid import Arm

CONTRASTS = grid.load('image_contrasts')

EXPERIMENT = dataclasses.replace(
  CONTRASTS,
  question='How does DOPD do on images with HS sent to the teacher?',
  arms={
    'opd': CONTRASTS.arms['opd'],
    'dopd': CONTRASTS.arms['dopd'],
    'hs_to_teacher': Arm('smoke,method=dopd', study.HS_TO_TEACHER),
  },
  contrasts=(),
  pool='image_contrasts',
)
