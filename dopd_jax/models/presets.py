"""Published sizes, as in `config.json` of Qwen/Qwen3-*, Qwen3-VL-* and HuggingFaceTB/SmolLM2-*."""

import dataclasses

from dopd_jax.models.config import DecoderConfig
from dopd_jax.models.vision import VisionConfig


def _qwen3(hidden_size, intermediate_size, layers, heads, *, tied):
  return DecoderConfig(
    vocab_size=151_936,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    qk_norm=True,
    tie_word_embeddings=tied,
    max_position_embeddings=40_960,
    bos_token_id=151_643,
    eos_token_ids=(151_645, 151_643),
    pad_token_id=151_643,
  )


def _qwen3_vl(text, **tower):
  vision = VisionConfig(num_heads=16, out_hidden_size=text.hidden_size, **tower)
  return dataclasses.replace(
    text,
    rope_theta=5e6,
    max_position_embeddings=262_144,
    vision=vision,
    mrope_section=(24, 20, 20),
    image_token_id=151_655,
    video_token_id=151_656,
    vision_start_token_id=151_652,
    vision_end_token_id=151_653,
  )


_TOWER = dict(depth=24, hidden_size=1_024, intermediate_size=4_096, deepstack_indexes=(5, 11, 17))
_LARGE_TOWER = dict(
  depth=27, hidden_size=1_152, intermediate_size=4_304, deepstack_indexes=(8, 16, 24)
)

PRESETS = {
  'qwen3-0.6b': _qwen3(1_024, 3_072, 28, 16, tied=True),
  'qwen3-1.7b': _qwen3(2_048, 6_144, 28, 16, tied=True),
  'qwen3-4b': _qwen3(2_560, 9_728, 36, 32, tied=True),
  'qwen3-8b': _qwen3(4_096, 12_288, 36, 32, tied=False),
  'qwen3-vl-2b': _qwen3_vl(_qwen3(2_048, 6_144, 28, 16, tied=True), **_TOWER),
  'qwen3-vl-4b': _qwen3_vl(_qwen3(2_560, 9_728, 36, 32, tied=True), **_TOWER),
  'qwen3-vl-8b': _qwen3_vl(_qwen3(4_096, 12_288, 36, 32, tied=False), **_LARGE_TOWER),
  'qwen3-vl-32b': _qwen3_vl(_qwen3(5_120, 25_600, 64, 64, tied=False), **_LARGE_TOWER),
  'smollm2-135m': DecoderConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=1e5,
    rms_norm_eps=1e-5,
    qk_norm=False,
    tie_word_embeddings=True,
    max_position_embeddings=8_192,
    initializer_range=1 / 24,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=2,
  ),
}
