"""Tiny random Qwen3-VL models, by transformers and by ourselves, and rows with images for both."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dopd_jax.models import DecoderConfig, Images, VisionConfig, build, vision_positions

V, IMAGE, VIDEO, START, END = 300, 290, 291, 292, 293
TEXT = dict(
  vocab_size=V,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
)
# Deepstack reads the first and the last block and skips the one between.
VISION = dict(
  depth=3,
  hidden_size=32,
  intermediate_size=56,
  num_heads=2,
  out_hidden_size=48,
  patch_size=4,
  temporal_patch_size=2,
  spatial_merge_size=2,
  in_channels=3,
  num_position_embeddings=36,
)
DEEPSTACK = (0, 2)
SECTION = (4, 2, 2)
IDS = dict(
  image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
C = 3 * 2 * 4 * 4


def config(deepstack=DEEPSTACK, vision=(), **changes):
  return DecoderConfig(
    **{
      **TEXT,
      'rope_theta': 1e6,
      'initializer_range': 0.2,
      'eos_token_ids': (3, 5),
      'pad_token_id': 0,
      'vision': VisionConfig(
        **{**VISION, 'deepstack_indexes': deepstack, 'initializer_range': 0.2, **dict(vision)}
      ),
      'mrope_section': SECTION,
      **IDS,
      **changes,
    }
  )


@functools.cache
def model(seed=0, dtype=jnp.float32, **changes):
  """(Model, params) with norms away from 1 and biases away from 0."""
  built = build(config(**changes), compute_dtype=dtype)
  rng = np.random.default_rng(seed)

  def shift(path, leaf):
    name = str(path[-1])
    if 'bias' in name:
      return jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)
    if 'norm' in name:
      return leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return leaf

  params = jax.jit(built.init)(jax.random.key(seed))
  return built, jax.tree_util.tree_map_with_path(shift, params)


def torch_model(seed=0, tied=True, deepstack=DEEPSTACK):
  """The same sizes as a transformers model in float32, where everything matters."""
  import torch
  import transformers

  torch.manual_seed(seed)
  rope = {'rope_type': 'default', 'rope_theta': 1e6, 'mrope_interleaved': True}
  made = transformers.Qwen3VLConfig(
    text_config={
      **TEXT,
      'rope_parameters': {**rope, 'mrope_section': list(SECTION)},
      'initializer_range': 0.2,
      'bos_token_id': 1,
      'eos_token_id': 2,
    },
    vision_config={
      **VISION,
      'deepstack_visual_indexes': list(deepstack),
      'initializer_range': 0.2,
    },
    tie_word_embeddings=tied,
    **IDS,
  )
  peer = transformers.Qwen3VLForConditionalGeneration(made).eval().float()
  with torch.no_grad():
    for path, parameter in peer.named_parameters():
      if path.endswith('bias'):
        parameter.normal_(0, 0.2)
      elif 'norm' in path:
        parameter.mul_(torch.rand_like(parameter) + 0.5)
      elif 'pos_embed' in path:
        parameter.mul_(3)
  return peer


class Batch(NamedTuple):
  """Rows for both sides: static shapes for us, images end to end for transformers."""

  tokens: np.ndarray  # [B, T]
  valid: np.ndarray
  images: Images
  pixels: dict  # by placeholder id: the patches of its images, end to end
  grids: dict  # and their grids


def image(*grid):
  return (IMAGE, grid)


def video(*grid):
  """A run of placeholders for each frame, with a timestamp of two tokens before it."""
  return (VIDEO, grid)


def batch(rows, side='right', T=None, P=None, I=None, seed=0):
  """Rows are lists of numbers (so many text tokens), images and videos.

  Padding holds junk: placeholders for the most part, and patches that are NaN.
  """
  rng = np.random.default_rng(seed)
  merge = VISION['spatial_merge_size'] ** 2
  text = lambda n: list(rng.integers(0, IMAGE, n))
  ids, pictures = [], []
  for row in rows:
    ids.append([])
    pictures.append([])
    for part in row:
      if isinstance(part, int):
        ids[-1] += text(part)
        continue
      kind, (t, h, w) = part
      frame = [kind] * (h * w // merge)
      if kind == VIDEO:
        for _ in range(t):
          ids[-1] += text(2) + [START] + frame + [END]
      else:
        ids[-1] += frame * t
      pictures[-1].append((kind, (t, h, w), rng.normal(size=(t * h * w, C)).astype(np.float32)))

  T = T or max(map(len, ids))
  I = I or max(map(len, pictures)) or 1
  P = P or max([len(p) for row in pictures for _, _, p in row], default=merge)
  tokens = rng.choice([7, START, IMAGE, VIDEO], (len(rows), T))
  valid = np.zeros((len(rows), T), bool)
  patches = np.full((len(rows), I, P, C), np.nan, np.float32)
  grid = np.zeros((len(rows), I, 3), np.int32)
  for b, row in enumerate(ids):
    here = slice(0, len(row)) if side == 'right' else slice(T - len(row), T)
    tokens[b, here], valid[b, here] = row, True
    for i, (_, shape, values) in enumerate(pictures[b]):
      patches[b, i, : len(values)], grid[b, i] = values, shape
  flat = [picture for row in pictures for picture in row]
  of = lambda kind, what: [picture[what] for picture in flat if picture[0] == kind]
  kinds = sorted({kind for kind, _, _ in flat})
  return Batch(
    tokens,
    valid,
    Images(patches, grid),
    {kind: np.concatenate(of(kind, 2)) for kind in kinds},
    {kind: np.array(of(kind, 1)) for kind in kinds},
  )


def torch_inputs(data):
  import torch

  # Padding holds junk for us; transformers counts placeholders there too.
  tokens = np.where(data.valid, data.tokens, 0)
  inputs = {'input_ids': tokens, 'attention_mask': data.valid.astype(np.int64)}
  if data.pixels:
    inputs['mm_token_type_ids'] = np.where(tokens == IMAGE, 1, 2 * (tokens == VIDEO))
  if IMAGE in data.pixels:
    inputs |= {'pixel_values': data.pixels[IMAGE], 'image_grid_thw': data.grids[IMAGE]}
  if VIDEO in data.pixels:
    inputs |= {'pixel_values_videos': data.pixels[VIDEO], 'video_grid_thw': data.grids[VIDEO]}
  return {name: torch.tensor(value) for name, value in inputs.items()}


def torch_logits(peer, data):
  """Logits [B, T, V], with transformers' own positions."""
  import torch

  inputs = torch_inputs(data)
  if not data.pixels:
    position = np.maximum(np.cumsum(data.valid, axis=1) - 1, 0)
    inputs['position_ids'] = torch.tensor(position)
  with torch.no_grad():
    return peer(**inputs).logits.numpy()


def positions(built, data):
  return vision_positions(data.tokens, data.valid, data.images.grid, built.config)


def see(built, params, data):
  return jax.jit(built.see)(params, Images(*map(jnp.asarray, data.images)))


def logits(built, params, data, features=None):
  """Ours, [B, T, V]; features are those of the batch's images unless given."""

  @jax.jit
  def compute(params, tokens, valid, positions, features):
    hidden, _ = built.forward(params, tokens, valid, positions, features=features)
    return jnp.einsum('BTD,VD->BTV', hidden, built.head(params))

  features = see(built, params, data) if features is None else features
  return compute(params, data.tokens, data.valid, positions(built, data), features)
