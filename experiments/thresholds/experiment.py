"""What DOPD's thresholds and its self-reference are made of: choices that the paper leaves open.

python -m experiments.run thresholds --jobs=2
"""

from experiments import study
from experiments.grid import Arm

EXPERIMENT = study.study(
  'Do the trim and the scope of the thresholds, or whose weights the student is pulled to, decide '
  'how DOPD does?',
  {
    'dopd': study.DOPD,  # over the batch, the upper 5 % trimmed, live weights
    'untrimmed': Arm('method=dopd', {'objective.trim': 0.0}),
    'trim_20': Arm('method=dopd', {'objective.trim': 0.2}),
    'by_sequence': Arm('method=dopd', {'objective.scope': 'sequence'}),
    'frozen_self': Arm('method=dopd', {'objective.self_reference': 'frozen'}),
    'ema_self': Arm('method=dopd', {'objective.self_reference': 'ema'}),
  },
)
