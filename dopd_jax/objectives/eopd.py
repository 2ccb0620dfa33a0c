r"""EOPD: forward KL added where the teacher is uncertain (arXiv 2603.07079).

    loss = -min(r A, clip(r) A) + alpha [H(T) > tau] sum_{v in top_k(T)} T_v (log T_v - log S_v)
    A = log T(y) - log S_old(y),   r = S(y) / S_old(y)

Added, not switched: every token is reinforced, and an uncertain teacher is also covered. The top-k
sum is not renormalised. H is the entropy over the whole vocabulary, nats.
"""

import dataclasses

import jax.numpy as jnp

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, Routed, old_logp
from dopd_jax.objectives.settings import Surrogate


@dataclasses.dataclass(frozen=True)
class Eopd(Surrogate):
  """Settings of the `eopd` objective; the defaults are the paper's, the clips those of ports."""

  name: str = 'eopd'
  threshold: float = 0.8  # tau, nats
  alpha: float = 1.0
  k: int = 16
  clip_low: float = 0.2
  clip_high: float = 0.2
  updates: int = 4  # batch 128 in mini-batches of 32

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    teacher, view = self.guide()
    shared = self.shared()
    cover = rules.Rule(
      teacher, 'forward_kl', 'top_k', self.alpha, self.k, tail='truncate', support='teacher'
    )

    def router(seen):
      uncertain = seen.signals[teacher].entropy > self.threshold
      regime = jnp.where(seen.mask, uncertain.astype(jnp.int32), -1)
      advantage = seen.signals[teacher].logp_y - old_logp(shared['old_logp'], seen)
      return Routed(regime, advantage=advantage)

    return Objective(
      **shared,
      views={**self.old_view, teacher: view},
      regimes=('certain', 'uncertain'),
      rules=((self.surrogate(),), (self.surrogate(), cover)),
      router=router,
    )
