r"""OPSD: on-policy self-distillation with the solution as hint (arXiv 2601.18734, version 3).

    y ~ S,   loss = sum_v min( F_v log(F_v / S_v), tau ),   F = the initial student with the hint

The clip bounds what one word of the vocabulary adds, so that words of style do not drown the rest;
a clipped sum can be negative. `clip = 0` is the forward KL itself.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, one_regime
from dopd_jax.objectives.settings import SelfGuided


@dataclasses.dataclass(frozen=True)
class Opsd(SelfGuided):
  """Settings of the `opsd` objective; tau is that of TRL's trainer and of RLCSD's port."""

  name: str = 'opsd'
  clip: float = 0.05  # tau, nats; 0 is off

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    guide, view = self.guide(self.teacher)
    return Objective(
      **self.shared(),
      views={guide: view},
      regimes=('all',),
      rules=((rules.Rule(guide, 'forward_kl', term_clip=self.clip or None),),),
      router=one_regime,
    )
