"""Tiny random models, made by transformers where a peer is needed and by ourselves where not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dopd_jax.models import DecoderConfig, build

V = 97
# head_dim 16 is not hidden_size / heads = 12; 4 query heads share 2 key heads.
SIZES = dict(
  vocab_size=V,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
)
KINDS = ('qwen3-tied', 'qwen3-untied', 'llama')


def config(kind='qwen3-tied', **changes):
  return DecoderConfig(
    **{
      **SIZES,
      'rope_theta': 1e6,
      'qk_norm': kind != 'llama',
      'tie_word_embeddings': kind != 'qwen3-untied',
      'initializer_range': 0.2,
      'eos_token_ids': (3, 5),
      'pad_token_id': 0,
      **changes,
    }
  )


@functools.cache
def model(kind='qwen3-tied', seed=0, dtype=jnp.float32, **changes):
  """(Model, params) with norms away from 1, so that none can be forgotten or moved unseen."""
  built = build(config(kind, **changes), compute_dtype=dtype)
  params = jax.jit(built.init)(jax.random.key(seed))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  rng = np.random.default_rng(seed)
  scaled = [
    leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) if 'norm' in str(path) else leaf
    for path, leaf in leaves
  ]
  return built, jax.tree.unflatten(jax.tree.structure(params), scaled)


def torch_model(kind='qwen3-tied', seed=0, **changes):
  """The same sizes as a transformers model in float32, norms away from 1."""
  import torch
  import transformers

  torch.manual_seed(seed)
  name = 'Llama' if kind == 'llama' else 'Qwen3'
  made = getattr(transformers, f'{name}Config')(
    **{
      **SIZES,
      'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
      'tie_word_embeddings': kind != 'qwen3-untied',
      'initializer_range': 0.2,
      'max_position_embeddings': 4096,
      'bos_token_id': 1,
      'eos_token_id': 2,
      **changes,
    }
  )
  peer = getattr(transformers, f'{name}ForCausalLM')(made).eval().float()
  with torch.no_grad():
    for path, parameter in peer.named_parameters():
      if 'norm' in path:
        parameter.mul_(torch.rand_like(parameter) + 0.5)
  return peer


def torch_logits(peer, tokens, valid, positions=None):
  """Logits [B, T, V] of a transformers model; positions count the valid tokens."""
  import torch

  if positions is None:
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
  with torch.no_grad():
    return peer(
      input_ids=torch.tensor(np.asarray(tokens)),
      attention_mask=torch.tensor(np.asarray(valid).astype(np.int64)),
      position_ids=torch.tensor(np.asarray(positions)),
    ).logits.numpy()


def logits(built, params, tokens, valid, positions=None):
  tokens, valid = jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)
  positions = None if positions is None else jnp.asarray(positions, jnp.int32)

  def compute(params, tokens, valid, positions):
    hidden, _ = built.forward(params, tokens, valid, positions)
    return jnp.einsum('BTD,VD->BTV', hidden, built.head(params))

  return jax.jit(compute)(params, tokens, valid, positions)


def batch(lengths, T, side='right', seed=0):
  """Random tokens [B, T] of ragged lengths, padded left or right with junk, and their mask."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (len(lengths), T))
  column = np.arange(T)[None, :]
  length = np.asarray(lengths)[:, None]
  valid = column < length if side == 'right' else column >= T - length
  return tokens, valid
