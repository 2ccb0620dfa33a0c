"""Which tensor of Hugging Face is which leaf of the tree, and how one is made of the other.

A matrix of Hugging Face is [out, in]; ours is [in, *out] with heads unfolded: `w.T.reshape(shape)`.
Embedding and head stay as they are, [V, D].
A layer of a stacked leaf is a tensor of its own.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from dopd_jax.models.config import DecoderConfig

# Without the prefix; {} is the number of the layer.
_TEXT = {
  'embedding': 'embed_tokens.weight',
  'final_norm': 'norm.weight',
  'layers/attention_norm': 'layers.{}.input_layernorm.weight',
  'layers/mlp_norm': 'layers.{}.post_attention_layernorm.weight',
  **{f'layers/attention/{m}_proj': f'layers.{{}}.self_attn.{m}_proj.weight' for m in 'qkvo'},
  **{f'layers/attention/{m}_norm': f'layers.{{}}.self_attn.{m}_norm.weight' for m in 'qk'},
  **{f'layers/mlp/{m}_proj': f'layers.{{}}.mlp.{m}_proj.weight' for m in ('gate', 'up', 'down')},
}
_HEAD = 'lm_head'
_LINEARS = {'linear_fc1': 'up', 'linear_fc2': 'down'}


def _with_bias(leaf: str, bias: str, module: str) -> dict[str, str]:
  return {leaf: f'{module}.weight', bias: f'{module}.bias'}


def _merger(leaves: str, module: str) -> dict[str, str]:
  names = _with_bias(f'{leaves}/norm', f'{leaves}/norm_bias', f'{module}.norm')
  for theirs, ours in _LINEARS.items():
    names |= _with_bias(f'{leaves}/{ours}_proj', f'{leaves}/{ours}_bias', f'{module}.{theirs}')
  return names


def _vision() -> dict[str, str]:
  block = 'vision/blocks'
  names = _with_bias('vision/patch_proj', 'vision/patch_bias', 'patch_embed.proj')
  names['vision/position_embedding'] = 'pos_embed.weight'
  for norm, theirs in (('attention_norm', 'norm1'), ('mlp_norm', 'norm2')):
    names |= _with_bias(f'{block}/{norm}', f'{block}/{norm}_bias', f'blocks.{{}}.{theirs}')
  for ours, theirs in (('qkv', 'qkv'), ('o', 'proj')):
    leaf = f'{block}/attention/{ours}'
    names |= _with_bias(f'{leaf}_proj', f'{leaf}_bias', f'blocks.{{}}.attn.{theirs}')
  for theirs, ours in _LINEARS.items():
    leaf = f'{block}/mlp/{ours}'
    names |= _with_bias(f'{leaf}_proj', f'{leaf}_bias', f'blocks.{{}}.mlp.{theirs}')
  names |= _merger('vision/merger', 'merger')
  return names | _merger('vision/deepstack_mergers', 'deepstack_merger_list.{}')


_VISION = _vision()


class Slot(NamedTuple):
  """Where a tensor of Hugging Face stands in the tree."""

  name: str
  leaf: str
  layer: int | None
  shape: tuple[int, ...]  # ours, of one layer
  hf_shape: tuple[int, ...]

  @property
  def turned(self) -> bool:
    return not self.leaf.endswith(('embedding', 'lm_head', 'norm', 'bias'))

  def from_hf(self, value: np.ndarray) -> np.ndarray:
    if not self.turned:
      return value
    # A patch embedding is a convolution there, [W, channels, frames, height, width].
    return value.reshape(len(value), -1).T.reshape(self.shape)

  def to_hf(self, leaf: np.ndarray | jax.Array) -> np.ndarray:
    """Of the whole leaf, all layers."""
    value = np.asarray(leaf if self.layer is None else leaf[self.layer])
    if self.turned:
      value = value.reshape(-1, self.hf_shape[0]).T.reshape(self.hf_shape)
    return np.ascontiguousarray(value)


def slots(config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[Slot]:
  """Every tensor of a model, by the shapes of its leaves, under their paths."""
  for leaf, struct in shapes.items():
    name = _name(config, leaf)
    if '{}' not in name:
      yield Slot(name, leaf, None, struct.shape, _hf_shape(config, leaf, struct.shape))
      continue
    shape = struct.shape[1:]
    for i in range(struct.shape[0]):
      yield Slot(name.format(i), leaf, i, shape, _hf_shape(config, leaf, shape))


def _name(config, leaf) -> str:
  if leaf == _HEAD:
    return 'lm_head.weight'
  if leaf in _VISION:
    return f'model.visual.{_VISION[leaf]}'
  return f'model.{"language_model." if config.vision else ""}{_TEXT[leaf]}'


def _hf_shape(config, leaf, shape) -> tuple[int, ...]:
  if leaf.endswith(('embedding', 'lm_head', 'norm', 'bias')):
    return shape
  if leaf == 'vision/patch_proj':
    vision = config.vision
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return (shape[1], vision.in_channels, *patch)
  inputs = shape[:-1] if leaf.endswith('o_proj') else shape[:1]
  return math.prod(shape[len(inputs) :]), math.prod(inputs)
