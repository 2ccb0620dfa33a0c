"""The paper's Fig. 10: the two weights of DOPD, one moved at a time.

python -m experiments.run sensitivity --jobs=2
"""

from experiments import study
from experiments.grid import Arm

EXPERIMENT = study.study(
  "How much do DOPD's two weights matter, beta_light (.6) and beta_weak (.3)?",
  {
    'dopd': study.DOPD,
    **{f'light_{b}': Arm('method=dopd', {'objective.beta_light': b / 10}) for b in (3, 9)},
    **{f'weak_{b}': Arm('method=dopd', {'objective.beta_weak': b / 10}) for b in (1, 6)},
  },
)
