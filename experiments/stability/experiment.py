"""The paper's Fig. 8: accuracy and entropy over the steps of a training.

python -m experiments.run stability --jobs=2
"""

from experiments import study
from experiments.grid import Arm

EXPERIMENT = study.study(
  'Whose accuracy rises longest, and whose entropy collapses: DOPD, OPD, ExOPD, EOPD, or what a '
  'student makes of its own hinted copy?',
  {
    'opd': study.OPD,
    'dopd': study.DOPD,
    'exopd': Arm('method=exopd'),
    'eopd': Arm('method=eopd'),
    'sdpo': Arm('method=sdpo'),
    'self_privileged': Arm('method=sdft'),
  },
  also=('train/entropy/S',),
)
