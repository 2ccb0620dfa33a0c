"""Arithmetic that every model shares: norms, rotary positions, grouped-query attention."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

# Finite, so that a query that may see nothing gives the mean of the values and not NaN.
_MASKED = -1e30
# Queries whose scores [B, Q, block, S] exist at once: at 6,144 tokens and 32 heads 0.2 GiB a row
# instead of 4.5. The backward pass makes them again, for one more forward pass of attention.
BLOCK = 256


def rms_norm(
  x: Float[Array, '... D'], scale: Float[Array, 'D'], eps: float
) -> Float[Array, '... D']:
  """Zhang and Sennrich (2019), in float32: x / sqrt(mean(x^2) + eps) * scale, in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)).astype(x.dtype)


def layer_norm(
  x: Float[Array, '... W'], scale: Float[Array, 'W'], bias: Float[Array, 'W'], eps: float
) -> Float[Array, '... W']:
  """Ba et al. (2016), in float32: (x - mean) / sqrt(var + eps) * scale + bias, in x's dtype."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), y.shape) for p in (scale, bias))
  return (y * scale + bias).astype(x.dtype)


def rope_frequencies(size: int, theta: float) -> Float[np.ndarray, 'size/2']:
  """theta^(-2i / size), float32."""
  return (theta ** -(np.arange(0, size, 2) / size)).astype(np.float32)


def rope_angles(
  positions: Int[Array, 'B T'] | Int[Array, 'B T 3'],
  head_dim: int,
  theta: float,
  section: tuple[int, int, int] | None = None,
) -> Float[Array, 'B T H/2']:
  """p * theta^(-2i / H), radians, in float32: in bfloat16 positions near 1,000 are 4 apart.

  With three positions (time, height, width) a token, `section` says how many frequencies each has.

  Raises: ValueError for three positions without `section`.
  """
  position = positions.astype(jnp.float32)
  if positions.ndim == 3:
    if section is None:
      raise ValueError('This model turns by one position a token: give forward positions [B, T].')
    position = position[:, :, mrope_axes(section, head_dim // 2)]
  else:
    position = position[:, :, None]
  return position * rope_frequencies(head_dim, theta)[None, None, :]


def mrope_axes(section: tuple[int, int, int], frequencies: int) -> Int[np.ndarray, 'H/2']:
  """The axis that turns each frequency, interleaved: 0 1 2 0 1 2 ... and time (0) to the end."""
  axes = np.zeros(frequencies, np.int32)
  for axis in (1, 2):
    axes[axis : 3 * section[axis] : 3] = axis
  return axes


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
  k_scale: Float[Array, 'B S K'] | None = None,
  v_scale: Float[Array, 'B S K'] | None = None,
) -> Float[Array, 'B T Q H']:
  """Grouped-query attention (Ainslie et al. 2023): query head i reads key head i // G, G = Q / K.

  Scores and softmax in float32; keys and values are not repeated. `mask` is true where a query may
  look, and may have one row for all queries. One that may look nowhere gives a finite value that
  means nothing. Keys and values that `quantize` made int8 come with their scales, which multiply
  scores and weights: a sum over H or S is scaled once, and no keys or values of full size are made.
  Queries go in blocks of at most `BLOCK`; each sees all keys at once, so that its softmax is the
  same. On one CUDA GPU 16-bit arrays go to cuDNN's kernel, which makes no scores but reads the mask
  as an array of 16 bits an entry; its gradients may differ in the last bits from run to run.
  """
  B, T = q.shape[:2]
  if _suits_cudnn(q, k):
    whole = jnp.broadcast_to(mask, (B, T, k.shape[1]))[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=whole, implementation='cudnn')
  count = -(-T // BLOCK)
  if count == 1:
    return _attend(q, k, v, mask, k_scale, v_scale)
  size = -(-T // (8 * count)) * 8  # blocks of one size, the last one filled up
  fill = count * size - T

  def blocks(x):
    x = jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

  # The gradients of keys and values are summed over blocks in the dtype that these come in.
  if jnp.issubdtype(k.dtype, jnp.floating):
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  one = lambda x: _attend(x[0], k, v, x[1], k_scale, v_scale)
  whole = jnp.broadcast_to(mask, (B, T, k.shape[1]))
  y = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (blocks(q), blocks(whole)))
  return jnp.moveaxis(y, 0, 1).reshape(B, -1, *q.shape[2:])[:, :T]


def _suits_cudnn(q: Array, k: Array) -> bool:
  """Several queries in 16 bits; with a mask cuDNN wants even lengths."""
  T, H = q.shape[1], q.shape[3]
  even = T > 1 and T % 2 == k.shape[1] % 2 == 0
  same = q.dtype == k.dtype and q.dtype.itemsize == 2
  return even and same and H % 8 == 0 and H <= 128 and _has_cudnn()


@functools.cache
def _has_cudnn() -> bool:
  """One CUDA GPU from Ampere on; on several it was never run."""
  if jax.default_backend() != 'gpu' or jax.device_count() > 1:
    return False
  capability = str(getattr(jax.local_devices()[0], 'compute_capability', ''))
  return re.fullmatch(r'\d+\.\d+', capability) is not None and float(capability) >= 8.0


def _attend(q, k, v, mask, k_scale, v_scale):
  """All queries at once."""
  B, T, Q, H = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, Q // K, H)
  # int8 is exact in every float that q may have.
  scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k.astype(q.dtype), preferred_element_type=jnp.float32)
  scores = scores * H**-0.5
  if k_scale is not None:
    scores = scores * _of_keys(k_scale)
  scores = jnp.where(mask[:, None, None, :, :], scores, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1)
  if v_scale is not None:
    weights = weights * _of_keys(v_scale)
  weights = weights.astype(q.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', weights, v.astype(q.dtype)).reshape(B, T, Q, H)


def quantize(x: Float[Array, '... H']) -> tuple[Int8[Array, '... H'], Float[Array, '...']]:
  """int8 q and float32 scales: q = round(x / scale), scale = max |x| / 127 over H.

  x is q * scale up to half a scale, max |x| / 254. A vector of zeros has scale 0.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  q = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
  return q.astype(jnp.int8), scale


def _of_keys(scale: Float[Array, 'B S K']) -> Float[Array, 'B K 1 1 S']:
  return scale.transpose(0, 2, 1)[:, :, None, None, :]
