"""Repairs of DOPD, each a method of its own, and targets that hold the plain teacher.

  python -m experiments.run repairs --jobs=2

Of the first family the policies are DOPD's own two; the second also asks the plain teacher, so that
what only the hint tells can be told from what the teacher knows. The coefficients of the learned
router are those that `python -m experiments.signal` found on the two students of the tuning.
"""

import json

from experiments import grid, study
from experiments.grid import Arm


def routing(**changes) -> Arm:
  """`hint_routing` with other settings."""
  return Arm('method=hint_routing', {f'objective.{name}': x for name, x in changes.items()})


ROUTER = grid.ROOT / 'experiments' / 'signal' / 'router.json'
LEARNED = json.loads(ROUTER.read_text())['coefficients']

EXPERIMENT = study.study(
  'Which change to DOPD, or which routing between the plain and the hinted teacher, does better, '
  'and at the price of how many forwards?',
  {
    'dopd': study.DOPD,
    # The two privileged policies, as in DOPD.
    'dopd_signed': Arm('method=dopd_signed'),
    'dopd_distributional': Arm('method=dopd_distributional'),
    'hs_to_teacher': Arm('method=dopd', study.HS_TO_TEACHER),
    'uniform_js': study.UNIFORM_JS,
    # Without the hint, or with both views of the teacher.
    'opd': study.OPD,
    'js_plain': Arm('method=opd', {'objective.divergence': 'js'}),
    'hint_routing': study.HINT_ROUTING,
    'hint_routing_soft': routing(levels=11),
    'hint_routing_teacher': routing(signal='teacher'),
    'hint_routing_learned': routing(signal='learned', coefficients=tuple(LEARNED)),
    'half_and_half': routing(signal='none'),
  },
  pool=study.TEXT,
)
