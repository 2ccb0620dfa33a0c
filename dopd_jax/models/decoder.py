"""The decoder of Qwen3, Llama and Qwen3-VL: Flax NNX definitions, and pure functions of parameters.

    x = E[tokens];  x += attention(norm(x));  x += mlp(norm(x)), L times;  hidden = norm(x)

`build` splits the module once and merges it inside a pure `forward`, so that parameters are a plain
nested dict of arrays. Blocks are stacked ([L, ...] leaves) and run by `jax.lax.scan`. With images,
features of the vision tower take the place of the embeddings of their placeholders, and those of
`deepstack` are added behind the first blocks (Meng et al. 2024).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int8

from dopd_jax.errors import UserError
from dopd_jax.models import layers
from dopd_jax.models.config import DecoderConfig
from dopd_jax.models.parameters import cast, matrix, ones
from dopd_jax.models.vision import Features, Images, VisionConfig, VisionTower
from dopd_jax.sharding import constrain_rows

Params = dict[str, Any]


class Cache(NamedTuple):
  """Keys and values of the columns seen so far: an argument and a result, never mutated.

  With scales, `k` and `v` are int8 and stand for k * k_scale and v * v_scale (`layers.quantize`).
  """

  k: Float[Array, 'L B S K H'] | Int8[Array, 'L B S K H']
  v: Float[Array, 'L B S K H'] | Int8[Array, 'L B S K H']
  valid: Bool[Array, 'B S']  # which columns hold a real token
  index: Int[Array, '']  # next column to write, the same for all rows
  position: Int[Array, 'B']  # next rotary position of each row
  k_scale: Float[Array, 'L B S K'] | None = None  # float32
  v_scale: Float[Array, 'L B S K'] | None = None

  @property
  def stored(self) -> 'Stored':
    return Stored(self.k, self.v, self.k_scale, self.v_scale)


class Stored(NamedTuple):
  """The part of a cache that has keys and values in it: dimensions are layer, row, column, ..."""

  k: Array
  v: Array
  k_scale: Array | None
  v_scale: Array | None


def quantize(cache: Cache) -> Cache:
  """The cache in int8: H + 4 bytes a vector of H numbers, where bfloat16 has 2 H.

  `forward` goes on with it as with the other, and quantizes what it writes.
  """
  (k, k_scale), (v, v_scale) = layers.quantize(cache.k), layers.quantize(cache.v)
  return cache._replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


class Model(NamedTuple):
  """Pure functions of a parameter tree.

  init(key) -> params                      random, float32; a vision tower's under 'vision'
  forward(params, tokens [B, T], valid [B, T], positions=None, cache=None, features=None)
      -> (hidden, cache)
      hidden [B, T, D] after the final norm, in compute dtype. Logits are `hidden @ head.T`, with
      `preferred_element_type=float32`. Padding (not valid) may be on either side: nothing looks at
      it, and its own rows are finite and mean nothing. `positions` [B, T] int32 default to the
      running count of valid tokens, continued from the cache. With a cache, tokens are written to
      columns index .. index + T - 1 (the caller keeps index + T <= S: under jit nobody else can)
      and column c looks at valid columns <= c, or if T = 1 at all valid columns: the caller may
      move `index` back and use columns again. Without a cache, None is returned for it.
      With images, `features` is what `see` gives, and `positions` [B, T, 3] what
      `models.vision_positions` gives: the k-th valid image or video id of a row is replaced by
      feature k of the row. Their number is the caller's to keep: an id without a feature meets
      zeros. Decoding goes on as for text, from the largest position of the row.
  init_cache(batch, length) -> Cache       empty, in the compute dtype
  head(params) -> [V, D]                   tied: the embedding table
  see(params, images) -> Features          the vision tower; None for a model of text alone
  quantize(cache) -> Cache                 the same in int8, with scales
  compute_dtype                            of activations
  """

  config: DecoderConfig
  init: Callable[..., Params]
  forward: Callable[..., tuple[Array, Cache | None]]
  init_cache: Callable[[int, int], Cache]
  head: Callable[[Params], Array]
  see: Callable[[Params, Images], Features] | None = None
  quantize: Callable[[Cache], Cache] = quantize
  compute_dtype: Any = jnp.float32


def build(config: DecoderConfig, *, compute_dtype: Any = jnp.float32, remat: bool = True) -> Model:
  """The decoder as pure functions.

  Args:
    config: its sizes.
    compute_dtype: of activations and cache; parameters are cast to it where they are used.
    remat: keep only each block's input for the backward pass, and recompute the rest.
  """

  def init(key):
    params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))
    if config.vision is not None:
      rngs = nnx.Rngs(params=jax.random.fold_in(key, 1))
      tower = VisionTower(config.vision, rngs=rngs)
      params['vision'] = nnx.to_pure_dict(nnx.state(tower, nnx.Param))
    return params

  definition = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

  def forward(params, tokens, valid, positions=None, cache=None, features=None):
    decoder = nnx.merge(definition, {k: v for k, v in params.items() if k != 'vision'})
    x = decoder.embed(tokens, compute_dtype)
    placed = None
    if features is not None:
      x, placed = _place(config, x, tokens, valid, positions, features)
    return decoder(x, valid, positions, cache, placed, remat=remat)

  def init_cache(batch, length):
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return Cache(
      k=jnp.zeros(shape, compute_dtype),
      v=jnp.zeros(shape, compute_dtype),
      valid=jnp.zeros((batch, length), bool),
      index=jnp.zeros((), jnp.int32),
      position=jnp.zeros((batch,), jnp.int32),
    )

  def head(params):
    return params['embedding' if config.tie_word_embeddings else 'lm_head']

  see = None if config.vision is None else _see(config.vision, compute_dtype, remat)
  return Model(config, init, forward, init_cache, head, see, compute_dtype=compute_dtype)


def _see(config: VisionConfig, dtype: Any, remat: bool) -> Callable[[Params, Images], Features]:
  definition = nnx.graphdef(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))

  def see(params, images):
    return nnx.merge(definition, params['vision'])(images, dtype, remat=remat)

  return see


class _Placed(NamedTuple):
  """Where features stand in a batch, and what deepstack adds there."""

  here: Bool[Array, 'B T']  # which tokens stand for a feature
  index: Int[Array, 'B T']  # and for which of their row
  deepstack: Float[Array, 'B K F D']

  def pick(self, features: Float[Array, 'B F D']) -> Float[Array, 'B T D']:
    """The feature of each placeholder; zeros elsewhere, and where a row has no such feature."""
    index = jnp.where(self.here, self.index, features.shape[1])
    return jnp.take_along_axis(features, index[:, :, None], axis=1, mode='fill', fill_value=0)

  def add(self, x: Float[Array, 'B T D'], layer: Int[Array, '']) -> Float[Array, 'B T D']:
    """x behind block `layer`: only the first K have something to add, the others skip it."""

    def added(x):
      features = jax.lax.dynamic_index_in_dim(self.deepstack, layer, axis=1, keepdims=False)
      return x + self.pick(features).astype(x.dtype)

    K = self.deepstack.shape[1]
    return jax.lax.cond(layer < K, added, lambda x: x, x) if K else x


def _place(config, x, tokens, valid, positions, features) -> tuple[Array, _Placed]:
  """The embeddings with features in the place of their placeholders."""
  if config.vision is None:
    raise ValueError('This model has no vision tower: forward takes no features.')
  if positions is None:
    raise ValueError('Images need the positions of models.vision_positions: give forward those.')
  here = valid & ((tokens == config.image_token_id) | (tokens == config.video_token_id))
  index = jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1
  placed = _Placed(here, index, features.deepstack)
  x = jnp.where(here[:, :, None], placed.pick(features.tokens).astype(x.dtype), x)
  return constrain_rows(x), placed


class Decoder(nnx.Module):
  """Embedding, L stacked blocks and the final norm. The head belongs to the caller's loss."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=config.num_hidden_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
      return Block(config, rngs=rngs)

    self.config = config
    self.embedding = matrix(config, rngs, config.vocab_size, config.hidden_size)
    self.layers = stacked(rngs)
    self.final_norm = ones(config.hidden_size)
    # A tied head is the embedding table used twice: one parameter, not two references to it.
    if not config.tie_word_embeddings:
      self.lm_head = matrix(config, rngs, config.vocab_size, config.hidden_size)

  def embed(self, tokens: Int[Array, 'B T'], dtype: Any) -> Float[Array, 'B T D']:
    return constrain_rows(self.embedding[...][tokens].astype(dtype))

  def __call__(self, x, valid, positions, cache: Cache | None, placed: _Placed | None, *, remat):
    T = x.shape[1]
    seen = 0 if cache is None else cache.position[:, None]
    if positions is None:
      positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1 + seen, 0)
    angles = layers.rope_angles(
      positions, self.config.head_dim, self.config.rope_theta, self.config.mrope_section
    )

    column = jnp.arange(T, dtype=jnp.int32)
    if cache is None:
      key_valid, key_column, stored, index = valid, column, None, None
    else:
      S = cache.valid.shape[1]
      if T > S:
        raise ValueError(f'{T} tokens do not fit a cache of {S} columns.')
      index = cache.index
      column = column + index
      key_valid = jax.lax.dynamic_update_slice(cache.valid, valid, (0, index))
      key_column, stored = jnp.arange(S, dtype=jnp.int32), cache.stored
    mask = key_valid[:, None, :]
    if T > 1:  # what is valid when one token comes is all before it, in whatever column
      mask = mask & (key_column[None, :] <= column[:, None])[None, :, :]

    definition, stack = nnx.split(self.layers)

    def body(carry, layer):
      (x, stored), (weights, i) = carry, layer
      x, stored = nnx.merge(definition, weights)(x, angles, mask, stored, (i, index))
      if placed is not None:
        x = placed.add(x, i)
      return (constrain_rows(x), stored), None

    if remat and cache is None:
      body = jax.checkpoint(body, prevent_cse=False)
    number = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
    (x, stored), _ = jax.lax.scan(body, (x, stored), (stack, number))
    hidden = layers.rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)
    if cache is None or stored is None:
      return hidden, None
    if positions.ndim == 3:  # an image may reach further in height or width than in time
      positions = jnp.max(positions, axis=2)
    last = jnp.max(jnp.where(valid, positions + 1, 0), axis=1)
    position = jnp.maximum(cache.position, last)
    return hidden, Cache(
      stored.k, stored.v, key_valid, index + T, position, stored.k_scale, stored.v_scale
    )


def drop_layers(
  params: Params, config: DecoderConfig, keep: Sequence[int]
) -> tuple[Params, DecoderConfig]:
  """A shallower model made of the layers `keep`.

  Every array is a copy. A student that shared arrays with its teacher would delete them when its
  state is donated to an update.

  Raises: UserError if `keep` is empty or names a layer that doesn't exist.
  """
  if not keep or not all(0 <= i < config.num_hidden_layers for i in keep):
    raise UserError(
      f'Cannot keep layers {list(keep)} of {config.num_hidden_layers}: name at least one of '
      f'0 to {config.num_hidden_layers - 1}.'
    )
  index = np.asarray(keep)
  kept = {name: jax.tree.map(jnp.copy, value) for name, value in params.items() if name != 'layers'}
  kept['layers'] = jax.tree.map(lambda x: x[index], params['layers'])
  return kept, dataclasses.replace(config, num_hidden_layers=len(keep))


class Block(nnx.Module):
  """Pre-norm attention and SwiGLU (Shazeer 2020), each added to its input."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.eps = config.rms_norm_eps
    self.attention_norm = ones(config.hidden_size)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = ones(config.hidden_size)
    self.mlp = Mlp(config, rngs=rngs)

  def __call__(self, x, angles, mask, stored, slot):
    y = layers.rms_norm(x, self.attention_norm[...], self.eps)
    y, stored = self.attention(y, angles, mask, stored, slot)
    x = x + y
    return x + self.mlp(layers.rms_norm(x, self.mlp_norm[...], self.eps)), stored


class Attention(nnx.Module):
  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    D, H = config.hidden_size, config.head_dim
    Q, K = config.num_attention_heads, config.num_key_value_heads
    self.eps, self.qk_norm = config.rms_norm_eps, config.qk_norm
    self.q_proj = matrix(config, rngs, D, Q, H)
    self.k_proj = matrix(config, rngs, D, K, H)
    self.v_proj = matrix(config, rngs, D, K, H)
    self.o_proj = matrix(config, rngs, Q, H, D)
    if config.qk_norm:
      self.q_norm, self.k_norm = ones(H), ones(H)

  def __call__(self, x, angles, mask, stored, slot):
    q = jnp.einsum('BTD,DQH->BTQH', x, cast(self.q_proj, x))
    k = jnp.einsum('BTD,DKH->BTKH', x, cast(self.k_proj, x))
    v = jnp.einsum('BTD,DKH->BTKH', x, cast(self.v_proj, x))
    if self.qk_norm:  # before RoPE: a scale that differs between paired dimensions does not commute
      q = layers.rms_norm(q, self.q_norm[...], self.eps)
      k = layers.rms_norm(k, self.k_norm[...], self.eps)
    q, k = layers.rope(q, angles), layers.rope(k, angles)
    new = Stored(k, v, None, None)
    if stored is not None:
      layer, column = slot
      if stored.k_scale is not None:
        (k, k_scale), (v, v_scale) = layers.quantize(k), layers.quantize(v)
        new = Stored(k, v, k_scale, v_scale)
      write = lambda old, new: jax.lax.dynamic_update_slice(
        old, new[None], (layer, 0, column) + (0,) * (old.ndim - 3)
      )
      stored = jax.tree.map(write, stored, new)
      new = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stored)
    y = layers.attention(q, new.k, new.v, mask, new.k_scale, new.v_scale)
    return jnp.einsum('BTQH,QHD->BTD', y, cast(self.o_proj, x)), stored


class Mlp(nnx.Module):
  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    D, F = config.hidden_size, config.intermediate_size
    self.gate_proj = matrix(config, rngs, D, F)
    self.up_proj = matrix(config, rngs, D, F)
    self.down_proj = matrix(config, rngs, F, D)

  def __call__(self, x):
    gate = jnp.einsum('BTD,DF->BTF', x, cast(self.gate_proj, x))
    up = jnp.einsum('BTD,DF->BTF', x, cast(self.up_proj, x))
    return jnp.einsum('BTF,FD->BTD', jax.nn.silu(gate) * up, cast(self.down_proj, x))
