"""Controls: is it the hint, or the routing, or merely a smaller step?

  python -m experiments.run controls --jobs=2

`dopd_shuffled`: the hints of other problems. `opd_weighted`: OPD to the hinted teacher with the
mean weight that DOPD gives to a token. `uniform_js`: no routing. `self_privileged`: no teacher.
"""

from experiments import study
from experiments.grid import Arm

WEIGHT = 0.62  # DOPD's mean `effective weight` on the pair of the quickstart
CELLS = {
  f'{regime}_{key}': value
  for regime in ('LH', 'LL', 'HT', 'HS')
  for key, value in (
    ('source', 'teacher'),
    ('divergence', 'reverse_kl'),
    ('region', 'full'),
    ('strength', 'light'),
  )
}

EXPERIMENT = study.study(
  'Is what DOPD does due to what its hint says, to its routing, or merely to its smaller weights?',
  {
    'dopd': study.DOPD,
    'dopd_shuffled': Arm('method=dopd,hint=shuffled'),
    'opd_privileged': study.OPD_PRIVILEGED,
    'opd_weighted': Arm('method=dopd', study.cells(**CELLS) | {'objective.beta_light': WEIGHT}),
    'uniform_js': study.UNIFORM_JS,
    'self_privileged': Arm('method=sdft'),
  },
)
