"""Dose and response: how much the hint tells that the prompt does not.

  python -m experiments.run rho --jobs=2

`rho` is the share of problems in which two chains lead to the query: rho log 2 nats that only the
hint tells. At 0 it tells nothing new and no illusion can appear. The students have learnt from .5.
"""

from experiments import study
from experiments.grid import Arm

LEVELS = ('0.0', '1.0')
METHODS = {'opd': study.OPD, 'opd_privileged': study.OPD_PRIVILEGED, 'dopd': study.DOPD}

EXPERIMENT = study.study(
  'Does the harm of the hint grow with what it tells that the prompt does not?',
  METHODS  # at .5
  | {
    f'{name}_rho{level.replace(".", "")}': Arm(f'{arm.arg},rho={level}', arm.changes)
    for level in LEVELS
    for name, arm in METHODS.items()
  },
  references={
    f'{name}_rho{level.replace(".", "")}': f'opd_rho{level.replace(".", "")}'
    for level in LEVELS
    for name in METHODS
  },
)
