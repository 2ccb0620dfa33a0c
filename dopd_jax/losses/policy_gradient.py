r"""Policy-gradient surrogates of one sampled token; `old_logp` is its log-prob when it was sampled.

Numerics: float32 (float64 for float64); a log-ratio is held to +-20, where its gradient is 0.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_LARGEST_LOG_RATIO = 20.0


def clipped_surrogate(
  logp_y: Float[Array, '...'],
  old_logp: Float[Array, '...'],
  advantage: Float[Array, '...'],
  clip_low: float | None = None,
  clip_high: float | None = None,
) -> Float[Array, '...']:
  r"""PPO's clipped surrogate as a loss (arXiv 1707.06347); without clips, importance sampling.

  .. math:: \ell = -\min(r A, clip(r, 1 - low, 1 + high) A), \quad r = p_y / p^{old}_y

  Args:
    logp_y: log-prob of the sampled token under the student, nats; the only gradient path.
    old_logp: the same when the token was sampled; a constant.
    advantage: A, nats or reward; a constant.
    clip_low: how far below 1 the ratio is followed; None for no lower clip.
    clip_high: how far above 1; None for no upper clip.

  Returns:
    One loss a token. Gradient in `logp_y`: `-r A`, and 0 where the clip holds.
  """
  ratio = jnp.exp(_log_ratio(logp_y, old_logp))
  advantage = lax.stop_gradient(advantage)
  low = None if clip_low is None else 1.0 - clip_low
  high = None if clip_high is None else 1.0 + clip_high
  return -jnp.minimum(ratio * advantage, jnp.clip(ratio, low, high) * advantage)


def capped_ratio(
  logp_y: Float[Array, '...'], old_logp: Float[Array, '...'], cap: float
) -> Float[Array, '...']:
  """`min(p_y / p_old_y, cap)`, a constant: the weight that corrects a divergence for staleness."""
  return lax.stop_gradient(jnp.minimum(jnp.exp(_log_ratio(logp_y, old_logp)), cap))


def _log_ratio(logp_y: Array, old_logp: Array) -> Array:
  difference = logp_y - lax.stop_gradient(old_logp)
  return jnp.clip(difference, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
