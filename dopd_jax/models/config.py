"""What a model is: the fields of a Hugging Face `config.json` that change its arithmetic."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dopd_jax.errors import UserError
from dopd_jax.models.vision import VisionConfig

_ARCHITECTURES = {
  'qwen3_vl': 'Qwen3VLForConditionalGeneration',
  'qwen3': 'Qwen3ForCausalLM',
  'llama': 'LlamaForCausalLM',
}
# Older files leave out what equalled transformers' default at the time.
_DEFAULTS: dict[str, dict[str, Any]] = {
  'qwen3_vl': {'head_dim': 128, 'max_position_embeddings': 128_000, 'rope_theta': 500_000.0},
  'qwen3': {'head_dim': 128, 'max_position_embeddings': 32_768, 'rope_theta': 10_000.0},
  'llama': {'head_dim': None, 'max_position_embeddings': 2_048, 'rope_theta': 10_000.0},
}
_SIZES = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)
# One over the largest value of a size: far above any model, and small enough to count to.
_BOUNDS = dict.fromkeys(_SIZES, 2**31) | {'num_hidden_layers': 2**14}
_BOUNDS |= dict.fromkeys(('num_key_value_heads', 'head_dim', 'max_position_embeddings'), 2**31)
_VISION_SIZES = ('depth', 'hidden_size', 'intermediate_size', 'num_heads', 'out_hidden_size')
_VISION_PATCHES = (
  'patch_size',
  'temporal_patch_size',
  'spatial_merge_size',
  'in_channels',
  'num_position_embeddings',
)
_SPECIAL = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Ids of the tokens around and in the place of an image, and transformers' defaults.
_VISION_IDS = {
  'image_token_id': 151_655,
  'video_token_id': 151_656,
  'vision_start_token_id': 151_652,
  'vision_end_token_id': 151_653,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder of the Qwen3 or Llama family, under the names of Hugging Face's `config.json`.

  `vocab_size` is the number of rows of the embedding table: it may be padded beyond the tokenizer.
  `head_dim` is its own number: Qwen3-0.6B has 16 heads of 128 over a width of 1,024.
  With `vision` it is Qwen3-VL: the decoder of Qwen3 behind a vision tower.
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
  vision: VisionConfig | None = None
  # M-RoPE, interleaved: how many of the head_dim / 2 frequencies turn by time, height and width.
  mrope_section: tuple[int, int, int] | None = None
  # The ids that stand for one feature of an image or a video, and those around them.
  image_token_id: int | None = None
  video_token_id: int | None = None
  vision_start_token_id: int | None = None
  vision_end_token_id: int | None = None

  def __post_init__(self):
    self._check_values()
    if self.num_attention_heads % self.num_key_value_heads:
      raise UserError(
        f'num_attention_heads={self.num_attention_heads} must be a multiple of '
        f'num_key_value_heads={self.num_key_value_heads}.'
      )
    if self.head_dim % 2:
      raise UserError(f'head_dim={self.head_dim} must be even, since RoPE rotates pairs.')
    if self.mrope_section is not None and sum(self.mrope_section) != self.head_dim // 2:
      raise UserError(
        f'mrope_section={self.mrope_section} must add up to head_dim / 2 = {self.head_dim // 2}.'
      )
    if self.vision is None:
      return
    if self.mrope_section is None or self.image_token_id is None or self.video_token_id is None:
      raise UserError('A vision tower needs mrope_section, image_token_id and video_token_id.')
    if self.vision.out_hidden_size != self.hidden_size:
      raise UserError(
        f'out_hidden_size={self.vision.out_hidden_size} of the vision tower must be hidden_size='
        f'{self.hidden_size} of the decoder.'
      )
    if not self.qk_norm:
      raise UserError('A vision tower goes with the decoder of Qwen3: set qk_norm to true.')

  def _check_values(self) -> None:
    """What a file may say of any field, whatever the fields mean together."""
    ids = (*_SPECIAL, *_VISION_IDS)
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      if name in _BOUNDS:
        whole = type(value) is int and 1 <= value < _BOUNDS[name]
        if not whole:
          raise UserError(f'{name} must be a whole number from 1 and not {value!r:.80}.')
      elif field.type in (float, 'float'):
        if not (isinstance(value, float) and 0 <= value < math.inf):
          raise UserError(f'{name} must be a number from 0, not {value!r:.80}.')
      elif field.type in (bool, 'bool') and not isinstance(value, bool):
        raise UserError(f'{name} must be true or false, not {value!r:.80}.')
      elif name in ids and not (value is None or type(value) is int):
        raise UserError(f'{name} must be the number of a token, not {value!r:.80}.')
    if not all(type(i) is int for i in self.eos_token_ids):
      raise UserError(f'eos_token_id must be numbers of tokens, not {self.eos_token_ids!r:.80}.')

  @property
  def model_type(self) -> str:
    if self.vision is not None:
      return 'qwen3_vl'
    return 'qwen3' if self.qk_norm else 'llama'

  @classmethod
  def from_hf(cls, hf: Mapping[str, Any]) -> 'DecoderConfig':
    """Reads a `config.json`, of transformers 5 or older, as a dict.

    Raises: UserError for a model type, or an option of one, that this decoder doesn't compute.
    """
    model_type = hf.get('model_type')
    if model_type not in _ARCHITECTURES:
      raise UserError(
        f'model_type {model_type!r} is not supported: use a model of type '
        f'{" or ".join(_ARCHITECTURES)}.'
      )
    text, defaults = text_config(hf), _DEFAULTS[model_type]
    _check_supported(model_type, {**text, 'quantization_config': hf.get('quantization_config')})
    _check_present(text, _SIZES, 'config.json')
    heads = text['num_attention_heads']
    ids = {k: hf.get(k) if hf.get(k) is not None else text.get(k) for k in _SPECIAL}
    eos = ids['eos_token_id']
    theta = _rope(text).get('rope_theta') or text.get('rope_theta') or defaults['rope_theta']
    return cls(
      **{name: text[name] for name in _SIZES},
      num_key_value_heads=text.get('num_key_value_heads') or heads,
      head_dim=text.get('head_dim') or defaults['head_dim'] or text['hidden_size'] // heads,
      rope_theta=float(theta),
      rms_norm_eps=text.get('rms_norm_eps', 1e-6),
      qk_norm=model_type != 'llama',
      tie_word_embeddings=text.get('tie_word_embeddings', False),
      max_position_embeddings=text.get(
        'max_position_embeddings', defaults['max_position_embeddings']
      ),
      initializer_range=text.get('initializer_range', 0.02),
      bos_token_id=ids['bos_token_id'],
      eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
      pad_token_id=ids['pad_token_id'],
      **(_vision_fields(hf, text) if model_type == 'qwen3_vl' else {}),
    )

  def to_hf(self) -> dict[str, Any]:
    """The `config.json` of this model, as transformers 5 writes and reads it."""
    eos = list(self.eos_token_ids)
    same = (*_SIZES, 'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'tie_word_embeddings')
    same += ('max_position_embeddings', 'initializer_range', 'bos_token_id', 'pad_token_id')
    rope = {'rope_theta': self.rope_theta, 'rope_type': 'default'}
    text = {
      **{name: getattr(self, name) for name in same},
      'eos_token_id': eos[0] if len(eos) == 1 else eos or None,
      'rope_parameters': rope,
      # transformers 4 reads this one.
      'rope_theta': self.rope_theta,
      'hidden_act': 'silu',
      'attention_bias': False,
    }
    named = {'architectures': [_ARCHITECTURES[self.model_type]], 'model_type': self.model_type}
    if self.vision is None:
      return named | text | {'dtype': 'float32'}
    mrope = {'mrope_interleaved': True, 'mrope_section': list(self.mrope_section or ())}
    # And this one, beside rope_theta.
    text |= {'rope_parameters': rope | mrope, 'rope_scaling': rope | mrope}
    return {
      **named,
      'text_config': {'model_type': 'qwen3_vl_text', **text},
      'vision_config': _vision_to_hf(self.vision),
      **{name: getattr(self, name) for name in _VISION_IDS},
      'tie_word_embeddings': self.tie_word_embeddings,
      'dtype': 'float32',
    }


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
  """The language model's part of a `config.json`: nested in a vision-language model, else all."""
  nested = hf.get('text_config')
  if nested is None:
    return hf
  # Whether the head is tied is said at the top, where transformers looks for it.
  tied = hf.get('tie_word_embeddings', nested.get('tie_word_embeddings', False))
  return {**nested, 'tie_word_embeddings': tied}


def _vision_fields(hf: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
  """What Qwen3-VL's `config.json` says beside the decoder."""
  vision, rope = hf.get('vision_config') or {}, _rope(text)
  _check_present(
    vision, (*_VISION_SIZES, 'deepstack_visual_indexes'), "config.json's vision_config"
  )
  patches = {name: vision[name] for name in _VISION_PATCHES if name in vision}
  unsupported = {
    'M-RoPE that is not interleaved': not rope.get('mrope_interleaved', True),
    f'the vision activation {vision.get("hidden_act")!r}': (
      vision.get('hidden_act', 'gelu_pytorch_tanh') != 'gelu_pytorch_tanh'
    ),
    'patches that are not square': not all(isinstance(size, int) for size in patches.values()),
  }
  _refuse('qwen3_vl', unsupported)
  return {
    'vision': VisionConfig(
      **{name: vision[name] for name in _VISION_SIZES},
      deepstack_indexes=tuple(vision['deepstack_visual_indexes']),
      **patches,
      rope_theta=float(_rope(vision).get('rope_theta') or 10_000.0),
      initializer_range=vision.get('initializer_range', 0.02),
    ),
    'mrope_section': tuple(rope.get('mrope_section') or (24, 20, 20)),
    **{name: hf.get(name, default) for name, default in _VISION_IDS.items()},
  }


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
  same = (*_VISION_SIZES, *_VISION_PATCHES, 'initializer_range')
  return {
    'model_type': 'qwen3_vl',
    **{name: getattr(vision, name) for name in same},
    'deepstack_visual_indexes': list(vision.deepstack_indexes),
    'hidden_act': 'gelu_pytorch_tanh',
    'rope_parameters': {'rope_theta': vision.rope_theta, 'rope_type': 'axial'},
  }


def _check_present(hf: Mapping[str, Any], names: tuple[str, ...], file: str) -> None:
  missing = [name for name in names if hf.get(name) is None]
  if missing:
    raise UserError(f'{file} lacks {", ".join(missing)}: add what the model was made with.')


def _rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
  """Settings of RoPE: `rope_parameters` since transformers 5, `rope_scaling` before."""
  return hf.get('rope_parameters') or hf.get('rope_scaling') or {}


def _check_supported(model_type: str, hf: Mapping[str, Any]) -> None:
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
    'M-RoPE without a vision tower': model_type != 'qwen3_vl' and 'mrope_section' in rope,
    'a partial rotary factor': rope.get('partial_rotary_factor', 1.0) != 1.0,
    'attention bias': bool(hf.get('attention_bias', False)),
    'an MLP bias': bool(hf.get('mlp_bias', False)),
    'sliding-window attention': sliding,
    f'the activation {hf.get("hidden_act")!r}': hf.get('hidden_act', 'silu') != 'silu',
    'quantised weights': hf.get('quantization_config') is not None,
  }
  _refuse(model_type, unsupported)


def _refuse(model_type: str, unsupported: Mapping[str, bool]) -> None:
  for what, found in unsupported.items():
    if found:
      raise UserError(
        f'This {model_type} model uses {what}, which is not supported: use a model without it.'
      )
