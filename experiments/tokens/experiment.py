"""The paper's Table 6: which tokens carry loss, all treated alike or each by its regime.

  python -m experiments.run tokens --jobs=2

Without adaption: JS to the hinted teacher with weight 1, on the tokens of the named regimes only.
With adaption: each of these regimes as DOPD has it. All four without adaption is `uniform_js`.
"""

from experiments import study
from experiments.grid import Arm

OFF = {regime: {f'{regime}_strength': 'none'} for regime in ('LH', 'LL', 'HT', 'HS')}


def alike(*regimes: str) -> Arm:
  """JS to the teacher with weight 1 on these regimes."""
  changes = {}
  for regime, off in OFF.items():
    on = {'source': 'teacher', 'divergence': 'js', 'region': 'full', 'strength': 'strong'}
    changes |= {f'{regime}_{k}': v for k, v in on.items()} if regime in regimes else off
  return Arm('method=dopd', study.cells(**changes))


def adaptive(*regimes: str) -> Arm:
  """DOPD's own rules on these regimes."""
  changes = {k: v for regime, off in OFF.items() if regime not in regimes for k, v in off.items()}
  return Arm('method=dopd', study.cells(**changes))


EXPERIMENT = study.study(
  'Which tokens carry what DOPD learns: those of one regime, of two, or all; and does treating '
  'each by its regime help?',
  {
    'dopd': study.DOPD,
    'ht_alike': alike('HT'),
    'ht_lh_alike': alike('HT', 'LH'),
    'ht_ll_alike': alike('HT', 'LL'),
    'ht_hs_alike': alike('HT', 'HS'),
    'uniform_js': study.UNIFORM_JS,
    'ht_lh': adaptive('HT', 'LH'),
    'ht_ll': adaptive('HT', 'LL'),
    'ht_hs': adaptive('HT', 'HS'),
  },
)
