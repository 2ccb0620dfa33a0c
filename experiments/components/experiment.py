"""The paper's Table 8: DOPD without one of its parts.

  python -m experiments.run components --jobs=2

Our reading of its rows: no hint for either policy; no loss where the student is the source (LL,
HS); none where the teacher is (LH, HT); one JS to the hinted teacher everywhere; JS in every
regime; the top K in every regime, here 8 of 57 words.
"""

from experiments import study
from experiments.grid import Arm

REGIMES = ('LH', 'LL', 'HT', 'HS')


def dopd(**cells: str) -> Arm:
  """DOPD with other cells."""
  return Arm('method=dopd', study.cells(**cells))


EXPERIMENT = study.study(
  'What does each part of DOPD contribute?',
  {
    'dopd': study.DOPD,
    'no_hint': Arm('method=dopd', {'data.privileged': 'none'}),
    'ht_lh': dopd(LL_strength='none', HS_strength='none'),  # without the student as a source
    'll_hs': dopd(LH_strength='none', HT_strength='none'),  # without the teacher
    'uniform_js': study.UNIFORM_JS,  # without the gap
    'js_everywhere': dopd(**{f'{regime}_divergence': 'js' for regime in REGIMES}),
    'dopd_k8': Arm('method=dopd', {'objective.k': 8}),  # the reference of the next
    'top8_everywhere': Arm(
      'method=dopd', {'objective.k': 8} | study.cells(**{f'{r}_region': 'top_k' for r in REGIMES})
    ),
  },
  references={'top8_everywhere': 'dopd_k8'},
  pool=study.TEXT,
)
