"""Controls: is it the hint, or the routing?

  python -m experiments.run controls --jobs=2

`dopd_shuffled`: the hints of other problems, which lead nowhere. `dopd_random`: DOPD's regimes
dealt to the tokens at random, as many of each. `uniform_js`: no routing. `self_privileged`: no
teacher. That of matched weight is an arm of `sensitivity`.
"""

from experiments import study
from experiments.grid import Arm

EXPERIMENT = study.study(
  'Is what DOPD does due to what its hint says, to which tokens it routes where, or to neither?',
  {
    'dopd': study.DOPD,
    'dopd_shuffled': Arm('method=dopd,hint=shuffled'),
    'opd_privileged': study.OPD_PRIVILEGED,
    'dopd_random': Arm('method=dopd_random'),
    'uniform_js': study.UNIFORM_JS,
    'self_privileged': Arm('method=sdft'),
  },
  pool=study.TEXT,
)
