"""The primary contrasts on images with one learning rate for all: what a careful rate changes.

  python -m experiments.run image_rates --jobs=2

Declared after `image_contrasts` had shown that DOPD collapses at the rate that its tuning chose:
exploratory. The other two arms are those of that experiment, whose tuning chose this very rate.
"""

from experiments import grid

CONTRASTS = grid.load('image_contrasts')

EXPERIMENT = grid.Experiment(
  question='How does DOPD do on images at the learning rate of the arms that it is held against?',
  base=CONTRASTS.base,
  arms={
    'opd': CONTRASTS.arms['opd'],
    'opd_privileged': CONTRASTS.arms['opd_privileged'],
    'dopd_careful': CONTRASTS.arms['dopd'],
  },
  seeds=CONTRASTS.seeds,
  pool='image_contrasts',
)
