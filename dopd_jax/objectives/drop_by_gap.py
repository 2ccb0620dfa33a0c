r"""Vanilla OPD without the tokens of largest, smallest or any gap: the paper's Fig. 4.

    A = |log Tp(y) - log Sp(y)|,   loss = mean over the tokens kept of RKL_K(S || T)

Dropped is a `share` of all tokens of the rollout batch. If a large gap means capability, dropping
the largest must cost most of what distillation gives, and dropping the smallest next to nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dopd_jax.losses import reduction, routing, rules, selection
from dopd_jax.objectives.grammar import Objective, Routed, View
from dopd_jax.objectives.settings import Guided, need_one_of


@dataclasses.dataclass(frozen=True)
class DropByGap(Guided):
  """Settings of the `drop_by_gap` objective."""

  name: str = 'drop_by_gap'
  drop: str = 'largest'  # or 'smallest', 'random'
  share: float = 0.2
  k: int = 128
  tail: str = 'bucket'
  support: str = 'student'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('drop', self.drop, ('largest', 'smallest', 'random'))
    teacher, view = self.guide()
    rule = rules.Rule(
      teacher, 'reverse_kl', 'top_k', k=self.k, tail=self.tail, support=self.support
    )

    def router(seen):
      gap = routing.privilege_advantage_gap(seen.signals['Sp'].logp_y, seen.signals['Tp'].logp_y)
      if self.drop == 'random':
        keep_by = jax.random.uniform(seen.key, gap.shape)
      else:
        keep_by = -gap if self.drop == 'largest' else gap
      kept = selection.top_share(keep_by, seen.mask, 1.0 - self.share)
      count = jnp.maximum(jnp.sum(seen.mask), 1)
      return Routed(
        jnp.where(seen.mask, jnp.where(kept, 0, 1), -1).astype(jnp.int32),
        {'gap': jnp.sum(jnp.where(seen.mask, gap, 0.0)) / count},
        {'gap': gap},
        coef=reduction.coefficients(kept, self.reduction),
      )

    return Objective(
      **self.shared(),
      views={
        'Sp': View('student', 'privileged'),
        'Tp': View('teacher', 'privileged'),
        teacher: view,
      },
      regimes=('kept', 'dropped'),
      rules=((rule,), ()),
      router=router,
    )
