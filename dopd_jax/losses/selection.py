"""Which tokens carry loss, where a method keeps only some: shares and scales over a masked set."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def top_share(
  score: Float[Array, '...'], mask: Bool[Array, '...'], share: float, axis: int | None = None
) -> Bool[Array, '...']:
  """The `share` of the entries under `mask` with the largest scores.

  Args:
    score: any shape; ignored where `mask` is False. A constant.
    mask: bool, the shape of `score`.
    share: in [0, 1]. Kept are `share * count` entries, rounded half up, and at least one of any.
    axis: None for one selection of everything, else one along that axis.

  Returns:
    bool, the shape of `score`; ties go to the entry that comes first.
  """
  score = lax.stop_gradient(score)
  if axis is None:
    return top_share(score.reshape(-1), mask.reshape(-1), share, 0).reshape(score.shape)
  order = jnp.argsort(jnp.where(mask, -score, jnp.inf), axis=axis, stable=True)
  rank = jnp.argsort(order, axis=axis, stable=True)
  count = jnp.sum(mask, axis=axis, keepdims=True)
  keep = jnp.floor(share * count + 0.5).astype(count.dtype)
  return mask & (rank < jnp.maximum(keep, 1))


def min_max(values: Float[Array, '...'], mask: Bool[Array, '...']) -> Float[Array, '...']:
  """`(x - min) / (max - min)` under `mask`; 0 elsewhere, and where all are equal."""
  values = lax.stop_gradient(values)
  low = jnp.min(values, where=mask, initial=jnp.inf)
  high = jnp.max(values, where=mask, initial=-jnp.inf)
  spread = jnp.where(high > low, high - low, 1.0)
  return jnp.where(mask & (high > low), (values - low) / spread, 0.0)
