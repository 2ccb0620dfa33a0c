"""The paper's Fig. 10: the two weights of DOPD, one moved at a time; and its mean weight alone.

python -m experiments.run sensitivity --jobs=2

`opd_privileged_matched` is OPD to the hinted teacher at DOPD's mean weight, .60: what LH does, in
every regime. So what DOPD does by its smaller steps alone is seen beside `opd_privileged`.
"""

from experiments import study
from experiments.grid import Arm

LH = {'source': 'teacher', 'divergence': 'reverse_kl', 'region': 'top_k', 'strength': 'light'}
AS_LH = study.cells(
  **{f'{regime}_{name}': value for regime in ('LL', 'HT', 'HS') for name, value in LH.items()}
)

EXPERIMENT = study.study(
  "How much do DOPD's two weights matter, beta_light (.6) and beta_weak (.3)?",
  {
    'dopd': study.DOPD,
    **{f'light_{b}': Arm('method=dopd', {'objective.beta_light': b / 10}) for b in (3, 9)},
    **{f'weak_{b}': Arm('method=dopd', {'objective.beta_weak': b / 10}) for b in (1, 6)},
    'opd_privileged': study.OPD_PRIVILEGED,
    'opd_privileged_matched': Arm('method=dopd', AS_LH),
  },
  references={'opd_privileged_matched': 'opd_privileged'},
)
