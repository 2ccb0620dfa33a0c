"""Any objective on logits: the dense library form, and the oracle of every faster one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from dopd_jax.losses import divergences, rules
from dopd_jax.objectives.grammar import Compare, Objective, Plan, Seen, Signals, make_plan


class Dense(NamedTuple):
  """What `objective_loss` tells beside the loss; `token_loss` [B, N] nats, unreduced."""

  plan: Plan
  token_loss: Float[Array, 'B N']


def signals_of(
  logits: Float[Array, '... V'], tokens: Int[Array, '...'], temperature: float = 1.0
) -> Signals:
  """What a view's logits say of the sampled tokens; float32, nats."""
  logits = divergences.as_float(logits) / temperature
  lse = jax.nn.logsumexp(logits, axis=-1)
  logp_y = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - lse
  entropy = lse - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
  return Signals(logp_y, lse, entropy)


def compare(
  pair: Compare, logits: Mapping[str, Float[Array, '... V']], temperature: float = 1.0
) -> Float[Array, '...']:
  """The signal of two views, nats."""
  student, source = (
    divergences.log_probs(logits[x], temperature) for x in (pair.student, pair.source)
  )
  return rules.DIVERGENCES[pair.divergence](student, source)


def blend(
  objective: Objective, logits: Mapping[str, Float[Array, '... V']]
) -> dict[str, Float[Array, '... V']]:
  """The logits of every source that the rules name, from those of the views."""
  mixed: dict[str, Any] = {
    name: sum(weight * divergences.as_float(logits[view]) for view, weight in parts.items())
    for name, parts in objective.blends.items()
  }
  return {**{name: logits[name] for name in objective.sources}, **mixed}


def objective_loss(
  objective: Objective,
  student_logits: Float[Array, 'B N V'],
  view_logits: Mapping[str, Float[Array, 'B N V']],
  tokens: Int[Array, 'B N'],
  mask: Bool[Array, 'B N'],
  *,
  logp: Float[Array, 'B N'] | None = None,
  reward: Float[Array, 'B'] | None = None,
  samples: int = 1,
  key: Key[Array, ''] | None = None,
) -> tuple[Float[Array, ''], Dense]:
  """The loss of a method on logits, as `dopd_loss` is that of DOPD.

  Args:
    objective: the method, `objectives.Eopd().build()`.
    student_logits: [B, N, V] of the student that is trained; the only gradient path.
    view_logits: [B, N, V] of each of the objective's views, by name; constants.
    tokens: [B, N] int32, the sampled tokens.
    mask: [B, N] bool, the tokens that carry loss.
    logp: [B, N] nats, the sampler's log-probs of the tokens, where `objective.old_logp` is
      'sampler'.
    reward: [B] in [0, 1], where the objective asks for rewards.
    samples: completions a prompt, whose rows are adjacent.
    key: for methods that draw (Uni-OPD's balance, a random drop).

  Returns:
    The loss, a scalar in nats, and `Dense`.
  """
  views = lax.stop_gradient(dict(view_logits))
  views = {name: jnp.where(mask[..., None], x, 0) for name, x in views.items()}
  T = objective.temperature
  signals = {name: signals_of(x, tokens, T) for name, x in views.items()}
  pairs = {name: compare(pair, views, T) for name, pair in objective.pairs.items()}
  plan = make_plan(objective, Seen(signals, mask, pairs, logp, reward, samples, key))
  loss = rules.batched_token_loss(
    objective.rules,
    student_logits,
    blend(objective, views),
    tokens,
    plan.regime,
    T,
    plan.advantage,
    plan.old_logp,
  )
  carries = plan.coef != 0
  total = jnp.sum(jnp.where(carries, plan.coef * jnp.where(carries, loss, 0.0), 0.0))
  return total, Dense(plan, lax.stop_gradient(loss))
