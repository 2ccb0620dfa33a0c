"""The primary contrasts on images with one learning rate for all: what a careful rate changes.

  python -m experiments.run image_rates --jobs=2

Declared after `image_contrasts` had shown that DOPD collapses at the rate that its tuning chose:
exploratory. The other two arms are those of that experiment, whose tuning chose this very rate.
"""

from experiments.grid import Arm, Experiment

PRIVILEGED = {'objective.teacher_context': 'privileged'}

EXPERIMENT = Experiment(
  question='How does DOPD do on images at the learning rate of the arms that it is held against?',
  base='configs/vlm.py',
  arms={
    'opd': Arm('smoke,method=opd'),
    'opd_privileged': Arm('smoke,method=opd', PRIVILEGED),
    'dopd_careful': Arm('smoke,method=dopd'),
  },
  seeds=range(10),
  pool='image_contrasts',
)
