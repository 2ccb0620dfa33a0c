"""Import of GGUF files (llama.cpp's format) of Llama models: weights, config and tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Needs the package `gguf`.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dopd_jax.errors import UserError
from dopd_jax.models import weights
from dopd_jax.models.config import DecoderConfig
from dopd_jax.models.decoder import Params

_NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_CONTROL = 3  # token_type of special tokens


def load(
  path: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[DecoderConfig, Params, Any]:
  """Reads a GGUF file of a Llama model: (config, params, tokenizer).

  Quantised tensors are dequantised. The tokenizer is a `PreTrainedTokenizerFast` with the file's
  chat template.

  Raises: UserError for a file that is no GGUF, or holds an architecture, RoPE scaling or tokenizer
    other than a Llama with SmolLM's byte-level BPE.
  """
  reader = _open(path)
  config, tokenizer = _config(path, reader), _tokenizer(path, reader)
  tensors = {}
  for tensor in reader.tensors:
    name = _hf_name(path, tensor.name)
    heads = {
      'attn_q.weight': config.num_attention_heads,
      'attn_k.weight': config.num_key_value_heads,
    }.get(tensor.name.split('.', 2)[-1])
    shape = tuple(int(n) for n in reversed(tensor.shape))
    tensors[name] = weights.Tensor(str(path), shape, _reader(tensor, heads))
  return config, weights.assemble(config, tensors, mesh=mesh, dtype=dtype), tokenizer


def convert(path: str | os.PathLike, directory: str | os.PathLike) -> None:
  """Writes a GGUF file as a Hugging Face directory, in float32. Raises as `load` and `save` do."""
  config, params, tokenizer = load(path)
  weights.save(directory, config, params, tokenizer=tokenizer)


def _open(path):
  try:
    import gguf
  except ImportError as e:
    raise UserError('Reading a GGUF file needs the package gguf: pip install gguf.') from e
  if not Path(path).is_file():
    raise UserError(f'The GGUF file {path} does not exist.')
  try:
    return gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError, OSError) as e:
    raise UserError(f'{path} is not a complete GGUF file ({e}): download or copy it again.') from e


def _get(reader, name, default: Any = None) -> Any:
  field = reader.get_field(name)
  return default if field is None else field.contents()


def _config(path, reader) -> DecoderConfig:
  architecture = _get(reader, 'general.architecture')
  scaling = _get(reader, 'llama.rope.scaling.type', 'none')
  if architecture != 'llama' or scaling != 'none':
    what = f'RoPE scaling {scaling!r}' if architecture == 'llama' else f'model {architecture!r}'
    raise UserError(f'{path} holds a {what}: only Llama models with plain RoPE can be imported.')
  llama = {
    key: _get(reader, f'llama.{key}')
    for key in (
      'embedding_length',
      'feed_forward_length',
      'block_count',
      'attention.head_count',
      'attention.head_count_kv',
      'attention.layer_norm_rms_epsilon',
      'context_length',
    )
  }
  shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
  missing = [f'llama.{key}' for key, value in llama.items() if value is None]
  missing += [] if 'token_embd.weight' in shapes else ['token_embd.weight']
  if missing:
    raise UserError(f'{path} lacks {missing[0]}: convert the model to GGUF again.')
  width, heads = llama['embedding_length'], llama['attention.head_count']
  eos = _get(reader, 'tokenizer.ggml.eos_token_id')
  return DecoderConfig(
    vocab_size=int(shapes['token_embd.weight'][1]),
    hidden_size=width,
    intermediate_size=llama['feed_forward_length'],
    num_hidden_layers=llama['block_count'],
    num_attention_heads=heads,
    num_key_value_heads=llama['attention.head_count_kv'],
    head_dim=_get(reader, 'llama.attention.key_length', width // heads),
    rope_theta=_get(reader, 'llama.rope.freq_base', 10_000.0),
    # A float32 in the file: 1e-5 and not 9.999999747378752e-06.
    rms_norm_eps=float(f'{llama["attention.layer_norm_rms_epsilon"]:.6g}'),
    qk_norm=False,
    tie_word_embeddings='output.weight' not in shapes,
    max_position_embeddings=llama['context_length'],
    bos_token_id=_get(reader, 'tokenizer.ggml.bos_token_id'),
    eos_token_ids=() if eos is None else (eos,),
    pad_token_id=_get(reader, 'tokenizer.ggml.padding_token_id'),
  )


def _hf_name(path, name: str) -> str:
  """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
  parts = name.split('.')
  layer = f'model.layers.{parts[1]}.' if parts[0] == 'blk' and len(parts) == 4 else ''
  stem = parts[2] if layer else parts[0]
  if stem not in _NAMES or parts[-1] != 'weight' or len(parts) != (4 if layer else 2):
    raise UserError(f'{path} holds {name}, which no plain Llama model has: use another file.')
  return f'{layer}{_NAMES[stem]}.weight'


def _reader(tensor, heads):
  def read() -> np.ndarray:
    import gguf

    value = gguf.dequantize(tensor.data, tensor.tensor_type)
    return value if heads is None else unpermute(value, heads)

  return read


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Rows of Q or K from llama.cpp's RoPE on pairs (2i, 2i + 1) to ours on pairs (i, i + H/2).

  weight: [heads * H, D], row 2i + j of a head being row i + j * H/2 of Hugging Face's.
  """
  rows, width = weight.shape
  return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _tokenizer(path, reader):
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  kind = _get(reader, 'tokenizer.ggml.model'), _get(reader, 'tokenizer.ggml.pre')
  if kind != ('gpt2', 'smollm'):
    raise UserError(
      f'{path} has a tokenizer of type {kind[0]}/{kind[1]}: only gpt2/smollm can be rebuilt.'
    )
  tokens = _get(reader, 'tokenizer.ggml.tokens')
  merges = [tuple(merge.split(' ')) for merge in _get(reader, 'tokenizer.ggml.merges')]
  vocab = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
  # SmolLM's: each digit is a token of its own, then GPT-2's pattern over bytes.
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  types = _get(reader, 'tokenizer.ggml.token_type')
  special = [token for token, type_ in zip(tokens, types) if type_ == _CONTROL]
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
  )
  named = {'bos': 'bos', 'eos': 'eos', 'unknown': 'unk', 'padding': 'pad'}
  ids = {short: _get(reader, f'tokenizer.ggml.{long}_token_id') for long, short in named.items()}
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    chat_template=_get(reader, 'tokenizer.chat_template'),
    model_max_length=_get(reader, 'llama.context_length'),
    clean_up_tokenization_spaces=False,
    **{f'{short}_token': tokens[i] for short, i in ids.items() if i is not None},
  )
