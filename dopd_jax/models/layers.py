"""Arithmetic that every model shares: RMSNorm, rotary positions, grouped-query attention."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a query that may see nothing gives the mean of the values and not NaN.
_MASKED = -1e30


def rms_norm(
  x: Float[Array, '... D'], scale: Float[Array, 'D'], eps: float
) -> Float[Array, '... D']:
  """Zhang and Sennrich (2019), in float32: x / sqrt(mean(x^2) + eps) * scale, in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)).astype(x.dtype)


def rope_angles(
  positions: Int[Array, 'B T'], head_dim: int, theta: float
) -> Float[Array, 'B T H/2']:
  """p * theta^(-2i / H), radians, in float32: in bfloat16 positions near 1,000 are 4 apart."""
  frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  return positions.astype(jnp.float32)[:, :, None] * frequency.astype(np.float32)[None, None, :]


def rope(x: Float[Array, 'B T K H'], angles: Float[Array, 'B T H/2']) -> Float[Array, 'B T K H']:
  """Su et al. (2021): rotates pairs (i, i + H/2), the halves layout of Hugging Face."""
  cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(
  q: Float[Array, 'B T Q H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K H'],
  mask: Bool[Array, 'B T S'],
) -> Float[Array, 'B T Q H']:
  """Grouped-query attention (Ainslie et al. 2023): query head i reads key head i // G, G = Q / K.

  Scores and softmax in float32; keys and values are not repeated. `mask` is true where a query may
  look. A query that may look nowhere gives a finite value that means nothing.
  """
  B, T, Q, H = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, Q // K, H)
  scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.float32) * H**-0.5
  scores = jnp.where(mask[:, None, None, :, :], scores, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', weights, v).reshape(B, T, Q, H)
