"""What a decoder is: the fields of a Hugging Face `config.json` that change its arithmetic."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dopd_jax.errors import UserError

_ARCHITECTURES = {'qwen3': 'Qwen3ForCausalLM', 'llama': 'LlamaForCausalLM'}
# Older files leave out what equalled transformers' default at the time.
_DEFAULTS = {
  'qwen3': {'head_dim': 128, 'max_position_embeddings': 32_768},
  'llama': {'head_dim': None, 'max_position_embeddings': 2_048},
}
_SIZES = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder of the Qwen3 or Llama family, under the names of Hugging Face's `config.json`.

  `vocab_size` is the number of rows of the embedding table: it may be padded beyond the tokenizer.
  `head_dim` is its own number: Qwen3-0.6B has 16 heads of 128 over a width of 1,024.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-6
  # RMSNorm over each query and key head, before RoPE: what tells Qwen3 from Llama.
  qk_norm: bool = True
  tie_word_embeddings: bool = True
  # The longest context, in tokens. The model itself doesn't check it: data does.
  max_position_embeddings: int = 32_768
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int | None = None

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise UserError(
        f'num_attention_heads={self.num_attention_heads} must be a multiple of '
        f'num_key_value_heads={self.num_key_value_heads}.'
      )
    if self.head_dim % 2:
      raise UserError(f'head_dim={self.head_dim} must be even, since RoPE rotates pairs.')

  @property
  def model_type(self) -> str:
    return 'qwen3' if self.qk_norm else 'llama'

  @classmethod
  def from_hf(cls, hf: Mapping[str, Any]) -> 'DecoderConfig':
    """Reads a `config.json`, of transformers 5 or older, as a dict.

    Raises: UserError for a model type, or an option of one, that this decoder doesn't compute.
    """
    _check_supported(hf)
    defaults = _DEFAULTS[hf['model_type']]
    missing = [name for name in _SIZES if hf.get(name) is None]
    if missing:
      raise UserError(f'config.json lacks {", ".join(missing)}: add what the model was made with.')
    heads = hf['num_attention_heads']
    eos = hf.get('eos_token_id')
    return cls(
      **{name: hf[name] for name in _SIZES},
      num_key_value_heads=hf.get('num_key_value_heads') or heads,
      head_dim=hf.get('head_dim') or defaults['head_dim'] or hf['hidden_size'] // heads,
      rope_theta=float(_rope(hf).get('rope_theta') or hf.get('rope_theta') or 10_000.0),
      rms_norm_eps=hf.get('rms_norm_eps', 1e-6),
      qk_norm=hf['model_type'] == 'qwen3',
      tie_word_embeddings=hf.get('tie_word_embeddings', False),
      max_position_embeddings=hf.get(
        'max_position_embeddings', defaults['max_position_embeddings']
      ),
      initializer_range=hf.get('initializer_range', 0.02),
      bos_token_id=hf.get('bos_token_id'),
      eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
      pad_token_id=hf.get('pad_token_id'),
    )

  def to_hf(self) -> dict[str, Any]:
    """The `config.json` of this decoder, as transformers 5 writes and reads it."""
    eos = list(self.eos_token_ids)
    same = (*_SIZES, 'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'tie_word_embeddings')
    same += ('max_position_embeddings', 'initializer_range', 'bos_token_id', 'pad_token_id')
    return {
      'architectures': [_ARCHITECTURES[self.model_type]],
      'model_type': self.model_type,
      **{name: getattr(self, name) for name in same},
      'eos_token_id': eos[0] if len(eos) == 1 else eos or None,
      'rope_parameters': {'rope_theta': self.rope_theta, 'rope_type': 'default'},
      # transformers 4 reads this one.
      'rope_theta': self.rope_theta,
      'hidden_act': 'silu',
      'attention_bias': False,
      'dtype': 'float32',
    }


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
  """The language model's part of a `config.json`: nested in a vision-language model, else all."""
  nested = hf.get('text_config')
  if nested is None:
    return hf
  # Whether the head is tied is said at the top, where transformers looks for it.
  return {'tie_word_embeddings': hf.get('tie_word_embeddings', False), **nested}


def _rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
  """Settings of RoPE: `rope_parameters` since transformers 5, `rope_scaling` before."""
  return hf.get('rope_parameters') or hf.get('rope_scaling') or {}


def _check_supported(hf: Mapping[str, Any]) -> None:
  model_type = hf.get('model_type')
  if model_type not in _ARCHITECTURES:
    raise UserError(
      f'model_type {model_type!r} is not supported: use a model of type '
      f'{" or ".join(_ARCHITECTURES)}.'
    )
  rope = _rope(hf)
  rope_type = rope.get('rope_type', rope.get('type', 'default'))
  if hf.get('use_sliding_window', False) and hf.get('sliding_window') is not None:
    layers = hf.get('num_hidden_layers', 0)
    sliding = 'sliding_attention' in (hf.get('layer_types') or ()) or (
      not hf.get('layer_types') and hf.get('max_window_layers', 28) < layers
    )
  else:
    sliding = False
  unsupported = {
    f'RoPE of type {rope_type!r}': rope_type != 'default',
    'a partial rotary factor': rope.get('partial_rotary_factor', 1.0) != 1.0,
    'attention bias': bool(hf.get('attention_bias', False)),
    'an MLP bias': bool(hf.get('mlp_bias', False)),
    'sliding-window attention': sliding,
    f'the activation {hf.get("hidden_act")!r}': hf.get('hidden_act', 'silu') != 'silu',
    'quantised weights': hf.get('quantization_config') is not None,
  }
  for what, found in unsupported.items():
    if found:
      raise UserError(
        f'This {model_type} model uses {what}, which is not supported: use a model without it.'
      )
