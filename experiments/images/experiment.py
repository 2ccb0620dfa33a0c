"""Methods on images: the tiny pair of `configs/vlm.py:smoke`, digits with boxes as the hint.

  python -m experiments.run images --jobs=2

The pair is the same in all runs; a seed decides pictures and sampling. One learning rate for all,
that of the config: nothing is tuned here.
"""

from experiments.grid import Arm, Experiment

EXPERIMENT = Experiment(
  question=(
    'What do methods do to the accuracy without the hint of a tiny student that finds the digit '
    'that is asked for in about 59 of 100 pictures, with a teacher that finds it in 99?'
  ),
  base='configs/vlm.py',
  arms={
    'opd': Arm('smoke,method=opd'),
    'opd_privileged': Arm('smoke,method=opd', {'objective.teacher_context': 'privileged'}),
    'dopd': Arm('smoke,method=dopd'),
    'va_opd': Arm('smoke,method=va_opd'),
    'vision_opd': Arm('smoke,method=vision_opd'),
    'vision_opd_boxed': Arm('smoke,method=vision_opd', {'objective.evidence': 'boxed'}),
  },
  seeds=(0, 1, 2),
)
