"""The vision tower of Qwen3-VL: patches of images and video frames to features of model width D.

    x = patches W + b + positions;  x += attention(norm(x));  x += mlp(norm(x)), L times
    tokens = merger(x);  deepstack[k] = merger_k(x behind block deepstack_indexes[k])

Shapes are static: I images a row and P patches an image at most. A patch looks at the patches of
its own frame, never at padding, so that what stands in padding changes nothing. Blocks are stacked
and run by `jax.lax.scan`, as those of the decoder.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.errors import UserError
from dopd_jax.models import layers
from dopd_jax.models.parameters import cast, matrix, ones, zeros
from dopd_jax.sharding import constrain_rows

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A vision tower, under the names of `vision_config` in Qwen3-VL's `config.json`.

  A patch is patch_size x patch_size pixels of temporal_patch_size frames (an image counts as that
  many equal ones), and spatial_merge_size x spatial_merge_size patches make one feature: 32 x 32
  pixels with the published sizes.
  """

  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  out_hidden_size: int
  # Blocks whose outputs go to the decoder too, in rising order: the k-th behind its block k.
  deepstack_indexes: tuple[int, ...]
  patch_size: int = 16
  temporal_patch_size: int = 2
  spatial_merge_size: int = 2
  in_channels: int = 3
  # A square grid of learned positions, stretched over each frame.
  num_position_embeddings: int = 2_304
  rope_theta: float = 10_000.0
  initializer_range: float = 0.02

  def __post_init__(self):
    if self.hidden_size % (4 * self.num_heads):
      raise UserError(
        f'hidden_size={self.hidden_size} of the vision tower must be a multiple of 4 x '
        f'num_heads={self.num_heads}, since RoPE turns pairs by row and by column.'
      )
    if self.grid_side**2 != self.num_position_embeddings:
      raise UserError(
        f'num_position_embeddings={self.num_position_embeddings} must be a square number.'
      )
    rising = list(self.deepstack_indexes) == sorted(set(self.deepstack_indexes))
    if not rising or not all(0 <= i < self.depth for i in self.deepstack_indexes):
      raise UserError(
        f'deepstack_indexes={self.deepstack_indexes} must rise, within 0 to {self.depth - 1}.'
      )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def grid_side(self) -> int:
    return round(self.num_position_embeddings**0.5)

  @property
  def patch_values(self) -> int:
    """C, the numbers in a patch: channels x frames x height x width, in that order."""
    return self.in_channels * self.temporal_patch_size * self.patch_size**2

  @property
  def merged(self) -> int:
    """Patches that make one feature."""
    return self.spatial_merge_size**2


class Images(NamedTuple):
  """Images, or videos, of a batch of rows, in the order of their placeholders.

  Patches come as transformers' `Qwen2VLImageProcessor` gives them: frame by frame, the patches of a
  feature together. Behind an image's t * h * w patches anything may stand.
  """

  patches: Float[Array, 'b I P C']
  grid: Int[Array, 'b I 3']  # t, h, w in patches; zeros where there is no image


class Features(NamedTuple):
  """Features of each row side by side: the k-th belongs to its k-th placeholder; zeros behind."""

  tokens: Float[Array, 'b F D']  # F = I * P / merged
  deepstack: Float[Array, 'b K F D']


class VisionTower(nnx.Module):
  """Patch embedding, L stacked blocks, and a merger for the last and each deepstack block."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    W, K = config.hidden_size, len(config.deepstack_indexes)

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def blocks(rngs):
      return VisionBlock(config, rngs=rngs)

    self.config = config
    self.patch_proj = matrix(config, rngs, config.patch_values, W)
    self.patch_bias = zeros(W)
    self.position_embedding = matrix(config, rngs, config.num_position_embeddings, W)
    self.blocks = blocks(rngs)
    self.merger = Merger(config, W, rngs=rngs)
    if K:

      @nnx.split_rngs(splits=K)
      @nnx.vmap(in_axes=0, out_axes=0)
      def mergers(rngs):
        return Merger(config, config.merged * W, rngs=rngs)

      self.deepstack_mergers = mergers(rngs)

  def __call__(self, images: Images, dtype: Any, *, remat: bool) -> Features:
    config = self.config
    b, I, P, _ = images.patches.shape
    if P % config.merged:
      raise ValueError(f'{P} patches do not make whole features of {config.merged}.')
    # Rows of the tower are images, n = b * I.
    place = locate(images.grid.reshape(b * I, 3), P, config.spatial_merge_size)
    patches = images.patches.reshape(b * I, P, -1).astype(dtype)
    x, behind = self.run(self.embed(patches, place), place, remat=remat)

    tokens = self.merger(x)
    deepstack = jnp.zeros((0, *tokens.shape), dtype)
    if config.deepstack_indexes:
      definition, stack = nnx.split(self.deepstack_mergers)
      deepstack = jax.vmap(lambda weights, x: nnx.merge(definition, weights)(x))(stack, behind)
    count = jnp.prod(images.grid, axis=-1, dtype=jnp.int32) // config.merged
    source, filled = _side_by_side(count, P // config.merged)

    def compact(x):
      x = jnp.take_along_axis(x.reshape(b, source.shape[1], -1), source[:, :, None], axis=1)
      return jnp.where(filled[:, :, None], x, 0)

    return Features(compact(tokens), jax.vmap(compact, out_axes=1)(deepstack))

  def embed(self, patches: Float[Array, 'n P C'], place: 'Place') -> Float[Array, 'n P W']:
    """Patches as vectors, with the learned position of each."""
    # Even a NaN in padding must not reach the sums of attention.
    patches = jnp.where(place.valid[:, :, None], patches, 0)
    x = jnp.einsum('nPC,CW->nPW', patches, cast(self.patch_proj, patches))
    x = x + jnp.broadcast_to(cast(self.patch_bias, x), x.shape)
    return constrain_rows(x + self._positions(place).astype(x.dtype))

  def _positions(self, place: 'Place') -> Float[Array, 'n P W']:
    """The learned grid stretched over each frame, corner on corner, bilinearly; float32."""
    side = self.config.grid_side

    def taps(index, size):
      at = index.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32)
      low = jnp.floor(at)
      weight = at - low
      low = low.astype(jnp.int32)
      return (low, 1 - weight), (jnp.minimum(low + 1, side - 1), weight)

    table = self.position_embedding[...].astype(jnp.float32)
    rows, columns = taps(place.row, place.height), taps(place.column, place.width)
    corners = (
      table[row * side + column] * (by_row * by_column)[:, :, None]
      for row, by_row in rows
      for column, by_column in columns
    )
    return functools.reduce(jnp.add, corners)

  def run(
    self, x: Float[Array, 'n P W'], place: 'Place', *, remat: bool
  ) -> tuple[Float[Array, 'n P W'], Float[Array, 'K n P W']]:
    """What the last block gives, and what the deepstack blocks give."""
    config = self.config
    frequency = layers.rope_frequencies(config.head_dim // 2, config.rope_theta)[None, None, :]
    rows, columns = (at.astype(jnp.float32)[:, :, None] for at in (place.row, place.column))
    angles = jnp.concatenate([rows * frequency, columns * frequency], axis=-1)
    same_frame = place.frame[:, :, None] == place.frame[:, None, :]
    mask = same_frame & place.valid[:, None, :]

    definition, stack = nnx.split(self.blocks)

    def block(x, weights):
      return constrain_rows(nnx.merge(definition, weights)(x, angles, mask))

    if remat:
      block = jax.checkpoint(block, prevent_cse=False)

    # Each block writes to a slot; those that deepstack doesn't read share the last.
    K = len(config.deepstack_indexes)
    slots = np.full(config.depth, K, np.int32)
    slots[list(config.deepstack_indexes)] = np.arange(K)

    def body(carry, layer):
      (x, behind), (weights, slot) = carry, layer
      x = block(x, weights)
      return (x, jax.lax.dynamic_update_index_in_dim(behind, x, slot, 0)), None

    behind = jnp.zeros((K + 1, *x.shape), x.dtype)
    (x, behind), _ = jax.lax.scan(body, (x, behind), (stack, jnp.asarray(slots)))
    return x, behind[:K]


class Place(NamedTuple):
  """Where each patch of an image stands. All int32; zeros where not valid."""

  valid: Bool[Array, 'n P']
  frame: Int[Array, 'n P']
  row: Int[Array, 'n P']
  column: Int[Array, 'n P']
  height: Int[Array, 'n 1']  # of a frame, in patches
  width: Int[Array, 'n 1']


def locate(grid: Int[Array, 'n 3'], P: int, merge: int) -> Place:
  """Frame, row and column of patches that come frame by frame, in blocks of merge x merge."""
  t, height, width = (grid[:, axis : axis + 1] for axis in range(3))
  p = jnp.arange(P, dtype=jnp.int32)[None, :]
  valid = p < t * height * width
  frame, p = jnp.divmod(p, jnp.maximum(height * width, 1))
  block, p = jnp.divmod(p, merge**2)
  block_row, block_column = jnp.divmod(block, jnp.maximum(width // merge, 1))
  row, column = block_row * merge + p // merge, block_column * merge + p % merge
  frame, row, column = (jnp.where(valid, at, 0) for at in (frame, row, column))
  return Place(valid, frame, row, column, height, width)


def _side_by_side(
  count: Int[Array, 'b I'], size: int
) -> tuple[Int[Array, 'b F'], Bool[Array, 'b F']]:
  """Where the k-th feature of a row stands among I times `size`, and whether there is one."""
  I = count.shape[1]
  end = jnp.cumsum(count, axis=1, dtype=jnp.int32)
  k = jnp.arange(I * size, dtype=jnp.int32)[None, :]
  image = jnp.sum(k[:, :, None] >= end[:, None, :], axis=2, dtype=jnp.int32)
  filled = image < I
  image = jnp.minimum(image, I - 1)
  start = jnp.take_along_axis(end - count, image, axis=1)
  return jnp.where(filled, image * size + k - start, 0), filled


class VisionBlock(nnx.Module):
  """Pre-norm attention and a GELU layer, each added to its input."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    W = config.hidden_size
    self.attention_norm, self.attention_norm_bias = ones(W), zeros(W)
    self.attention = VisionAttention(config, rngs=rngs)
    self.mlp_norm, self.mlp_norm_bias = ones(W), zeros(W)
    self.mlp = VisionMlp(config, rngs=rngs)

  def __call__(self, x, angles, mask):
    y = layers.layer_norm(x, self.attention_norm[...], self.attention_norm_bias[...], _EPS)
    x = x + self.attention(y, angles, mask)
    y = layers.layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], _EPS)
    return x + self.mlp(y)


class VisionAttention(nnx.Module):
  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    W, Q, H = config.hidden_size, config.num_heads, config.head_dim
    self.qkv_proj = matrix(config, rngs, W, 3, Q, H)
    self.qkv_bias = zeros(3 * W)
    self.o_proj = matrix(config, rngs, Q, H, W)
    self.o_bias = zeros(W)

  def __call__(self, x, angles, mask):
    proj = cast(self.qkv_proj, x)
    qkv = jnp.einsum('nPW,WXQH->nPXQH', x, proj)
    qkv = qkv + cast(self.qkv_bias, x).reshape(1, 1, *proj.shape[1:])
    q, k, v = (qkv[:, :, i] for i in range(3))
    y = layers.attention(layers.rope(q, angles), layers.rope(k, angles), v, mask)
    return _linear(jnp.einsum('nPQH,QHW->nPW', y, cast(self.o_proj, x)), self.o_bias)


class VisionMlp(nnx.Module):
  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    W, F = config.hidden_size, config.intermediate_size
    self.up_proj, self.up_bias = matrix(config, rngs, W, F), zeros(F)
    self.down_proj, self.down_bias = matrix(config, rngs, F, W), zeros(W)

  def __call__(self, x):
    y = _linear(jnp.einsum('nPW,WF->nPF', x, cast(self.up_proj, x)), self.up_bias)
    y = jax.nn.gelu(y, approximate=True)
    return _linear(jnp.einsum('nPF,FW->nPW', y, cast(self.down_proj, x)), self.down_bias)


class Merger(nnx.Module):
  """The patches of a feature side by side, through a GELU layer to the decoder's width.

  `norm_size` is the width of a patch, where each is normalised, or of all patches of a feature.
  """

  def __init__(self, config: VisionConfig, norm_size: int, *, rngs: nnx.Rngs):
    self.size, self.norm_size = config.merged * config.hidden_size, norm_size
    self.norm, self.norm_bias = ones(norm_size), zeros(norm_size)
    self.up_proj, self.up_bias = matrix(config, rngs, self.size, self.size), zeros(self.size)
    self.down_proj = matrix(config, rngs, self.size, config.out_hidden_size)
    self.down_bias = zeros(config.out_hidden_size)

  def __call__(self, x: Float[Array, 'n P W']) -> Float[Array, 'n P/merged D']:
    n = x.shape[0]
    x = x.reshape(n, -1, self.norm_size)
    x = layers.layer_norm(x, self.norm[...], self.norm_bias[...], _EPS).reshape(n, -1, self.size)
    x = _linear(jnp.einsum('nPX,XY->nPY', x, cast(self.up_proj, x)), self.up_bias)
    x = jax.nn.gelu(x, approximate=False)
    return _linear(jnp.einsum('nPY,YD->nPD', x, cast(self.down_proj, x)), self.down_bias)


def _linear(y, bias):
  return y + jnp.broadcast_to(cast(bias, y), y.shape)
