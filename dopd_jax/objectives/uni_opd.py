r"""Uni-OPD: the teacher's advantages, shifted until right completions win (arXiv 2605.03677).

    A = log T(y) - log S_old(y),   g_i = mean of A over the tokens of completion i
    per prompt:  gap = mean_{right} g - mean_{wrong} g;   if gap < delta:  s = delta - gap,
    A += s/2 on right completions, A -= s/2 on wrong ones
    loss = -min(r A, clip(r) A)

Before that each prompt keeps as many right as wrong completions, at random (not where all are one
or the other), and tokens on which the policies differ by `outlier` nats or more are left out.
Needs a verifier.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dopd_jax.losses import reduction
from dopd_jax.objectives.grammar import Objective, Routed, all_tokens, old_logp
from dopd_jax.objectives.settings import Surrogate, need_one_of

DIRECTIONS = {  # how much of the shift goes to right and to wrong completions
  'both': (0.5, -0.5),
  'correct_up': (1.0, 0.0),
  'incorrect_down': (0.0, -1.0),
}


@dataclasses.dataclass(frozen=True)
class UniOpd(Surrogate):
  """Settings of the `uni_opd` objective; the defaults are those of its released scripts."""

  name: str = 'uni_opd'
  margin: float = 0.4  # delta, nats a token; -inf never shifts
  direction: str = 'both'
  mode: str = 'mean'  # or 'minmax': the worst right completion against the best wrong one
  balance: bool = True
  outlier: float = 10.0
  clip_low: float = 0.2
  clip_high: float = 0.28

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('direction', self.direction, tuple(DIRECTIONS))
    need_one_of('mode', self.mode, ('mean', 'minmax'))
    teacher, view = self.guide()
    shared = self.shared() | {'rewards': True, 'least_samples': 2}

    def router(seen):
      advantage = seen.signals[teacher].logp_y - old_logp(shared['old_logp'], seen)
      mask = seen.mask & (jnp.abs(advantage) < self.outlier)
      groups = lambda x: x.reshape(-1, seen.samples)
      right = groups(seen.reward >= 0.5)
      alive = groups(jnp.any(mask, axis=1))
      if self.balance:
        alive = balanced(seen.key, right, alive)
        mask &= alive.reshape(-1, 1)
      length = jnp.maximum(jnp.sum(mask, axis=1), 1)
      mean = groups(jnp.sum(jnp.where(mask, advantage, 0.0), axis=1) / length)
      shift = self._shift(mean, right & alive, ~right & alive)
      up, down = DIRECTIONS[self.direction]
      by_row = jnp.where(right, up, down) * shift
      return Routed(
        all_tokens(mask),
        {'shifted_prompts': jnp.mean(shift > 0)},
        coef=reduction.coefficients(mask, self.reduction),
        advantage=advantage + by_row.reshape(-1, 1),
      )

    return Objective(
      **shared,
      views={**self.old_view, teacher: view},
      regimes=('all',),
      rules=((self.surrogate(),),),
      router=router,
    )

  def _shift(self, mean, right, wrong):
    """[G, M] mean advantages and the two classes -> [G, 1] shifts, 0 where nothing is to do."""
    if self.mode == 'mean':
      of = lambda which: jnp.sum(jnp.where(which, mean, 0.0), 1) / jnp.maximum(jnp.sum(which, 1), 1)
      high, low = of(right), of(wrong)
    else:
      high = jnp.min(mean, axis=1, where=right, initial=jnp.inf)
      low = jnp.max(mean, axis=1, where=wrong, initial=-jnp.inf)
    both = jnp.any(right, axis=1) & jnp.any(wrong, axis=1)
    gap = jnp.where(both, high, 0.0) - jnp.where(both, low, 0.0)
    return jnp.where(both & (gap < self.margin), self.margin - gap, 0.0)[:, None]


def balanced(key, right, alive):
  """[G, M] bool: of the completions `alive`, at random as many right as wrong of each prompt.

  A prompt whose completions are all right or all wrong keeps them.
  """
  draw = jax.random.uniform(key, right.shape)

  def first(which, count):
    order = jnp.argsort(jnp.where(which, draw, 2.0), axis=1)
    return which & (jnp.argsort(order, axis=1) < count[:, None])

  sides = right & alive, ~right & alive
  count = jnp.minimum(*(jnp.sum(side, axis=1) for side in sides))
  kept = first(sides[0], count) | first(sides[1], count)
  return jnp.where((count == 0)[:, None], alive, kept)
