"""The paper's Fig. 4: vanilla OPD without a fifth of the tokens.

python -m experiments.run drop --jobs=2
"""

from experiments import study
from experiments.grid import Arm

EXPERIMENT = study.study(
  'Is the benefit of OPD in the tokens of large gap: what is lost when a fifth of the tokens is '
  'left out, those of the largest gap, of the smallest, or any?',
  {
    'opd': study.OPD,
    **{
      f'drop_{which}': Arm('method=drop_by_gap', {'objective.drop': which})
      for which in ('largest', 'smallest', 'random')
    },
  },
  pool=study.TEXT,
)
