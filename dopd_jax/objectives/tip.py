r"""TIP: distil where the student is uncertain or wrong (arXiv 2604.14084).

    s = h + d - h d,   h = scaled entropy of S,   d = scaled RKL(S || T)      (scaled: min-max)
    loss = mean over the top `share` of tokens by s of RKL(S || T)

The scales and the share are of the whole rollout batch. Which divergence stands in d is not
certain from the paper; this is the one that the loss uses.
"""

import dataclasses

import jax.numpy as jnp

from dopd_jax.losses import reduction, rules, selection
from dopd_jax.objectives.grammar import Compare, Objective, Routed, View
from dopd_jax.objectives.settings import Guided


@dataclasses.dataclass(frozen=True)
class Tip(Guided):
  """Settings of the `tip` objective."""

  name: str = 'tip'
  share: float = 0.5  # of the tokens, rho
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    teacher, view = self.guide()

    def router(seen):
      h = selection.min_max(seen.signals['S'].entropy, seen.mask)
      d = selection.min_max(seen.pairs['divergence'], seen.mask)
      score = h + d - h * d
      kept = selection.top_share(score, seen.mask, self.share)
      return Routed(
        jnp.where(seen.mask, jnp.where(kept, 0, 1), -1).astype(jnp.int32),
        token={'score': score},
        coef=reduction.coefficients(kept, self.reduction),
      )

    return Objective(
      **self.shared(),
      views={'S': View('student'), teacher: view},
      pairs={'divergence': Compare('S', teacher, 'reverse_kl')},
      regimes=('kept', 'dropped'),
      rules=((rules.Rule(teacher, 'reverse_kl'),), ()),
      router=router,
    )
