r"""OPCD: on-policy context distillation (arXiv 2602.12275).

    y ~ S(.|x),   loss = RKL_K( S(.|x) || T(.|c, x) )      K of the student, truncated

The guide reads a context that the student does not. In microsoft/LMOps it is a copy of the student
or a larger model; here the teacher by default, since the paper compares OPCD as a method with one.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, one_regime
from dopd_jax.objectives.settings import SelfGuided


@dataclasses.dataclass(frozen=True)
class Opcd(SelfGuided):
  """Settings of the `opcd` objective; k and tail are those of microsoft/LMOps."""

  name: str = 'opcd'
  teacher: str = 'teacher'
  k: int = 256
  tail: str = 'truncate'  # the bare truncated sum is no divergence: it can be negative
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    guide, view = self.guide(self.teacher)
    return Objective(
      **self.shared(),
      views={guide: view},
      regimes=('all',),
      rules=((rules.Rule(guide, 'reverse_kl', 'top_k', k=self.k, tail=self.tail),),),
      router=one_regime,
    )
