r"""SDFT: the student with a demonstration teaches itself without one (arXiv 2601.19897).

    y ~ S,   loss = RKL( S(.|x) || F(.|x, demonstration) )

F is the student as given, or its running mean. Ports disagree on divergence and weights; this is
the objective of the paper.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, one_regime
from dopd_jax.objectives.settings import SelfGuided, need_one_of


@dataclasses.dataclass(frozen=True)
class Sdft(SelfGuided):
  """Settings of the `sdft` objective."""

  name: str = 'sdft'
  region: str = 'full'  # or 'top_k', with k and tail
  k: int = 128
  tail: str = 'bucket'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('region', self.region, ('full', 'top_k'))
    guide, view = self.guide(self.teacher)
    return Objective(
      **self.shared(),
      views={guide: view},
      regimes=('all',),
      rules=((rules.Rule(guide, 'reverse_kl', self.region, k=self.k, tail=self.tail),),),
      router=one_regime,
    )
