"""config.json, of transformers 5 and older; and what this decoder doesn't compute."""

import json

import pytest

from dopd_jax.errors import UserError
from dopd_jax.models import DecoderConfig
from dopd_jax.models.config import text_config
from tests.models import tiny

OLD = {  # as Qwen3-0.6B's file was written by transformers 4.51
  'architectures': ['Qwen3ForCausalLM'],
  'attention_bias': False,
  'bos_token_id': 151643,
  'eos_token_id': 151645,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 1024,
  'intermediate_size': 3072,
  'max_position_embeddings': 40960,
  'max_window_layers': 28,
  'model_type': 'qwen3',
  'num_attention_heads': 16,
  'num_hidden_layers': 28,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': None,
  'tie_word_embeddings': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}


def test_old_and_new_files_say_the_same():
  new = {k: v for k, v in OLD.items() if k not in ('rope_theta', 'rope_scaling')}
  new['rope_parameters'] = {'rope_theta': 1000000, 'rope_type': 'default'}
  assert DecoderConfig.from_hf(new) == DecoderConfig.from_hf(OLD)
  assert DecoderConfig.from_hf(OLD).rope_theta == 1e6
  assert DecoderConfig.from_hf(OLD).eos_token_ids == (151645,)


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_what_transformers_writes_is_read(kind, tmp_path):
  peer = tiny.torch_model(kind)
  peer.config.save_pretrained(tmp_path)
  config = DecoderConfig.from_hf(json.loads((tmp_path / 'config.json').read_text()))
  assert config.model_type == peer.config.model_type
  assert config.rope_theta == 1e6
  assert config.tie_word_embeddings == peer.config.tie_word_embeddings
  assert config.max_position_embeddings == 4096
  for name, value in tiny.SIZES.items():
    assert getattr(config, name) == value


@pytest.mark.parametrize('kind', tiny.KINDS)
@pytest.mark.parametrize('eos', [(), (2,), (2, 7)])
def test_round_trip(kind, eos):
  config = tiny.config(kind, eos_token_ids=eos)
  assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_a_head_width_that_is_left_out():
  """transformers' defaults: 128 for Qwen3, whatever its width; hidden / heads for Llama."""
  hf = {k: v for k, v in OLD.items() if k != 'head_dim'}
  assert DecoderConfig.from_hf(hf).head_dim == 128
  assert DecoderConfig.from_hf(hf | {'model_type': 'llama'}).head_dim == 64


def test_a_nested_text_config():
  text = {k: v for k, v in OLD.items() if k != 'tie_word_embeddings'}
  nested = {'model_type': 'qwen3_vl', 'vocab_size': 1, 'tie_word_embeddings': True}
  config = DecoderConfig.from_hf(text_config(nested | {'text_config': text}))
  assert config == DecoderConfig.from_hf(OLD)
  assert text_config(OLD) is OLD


LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0}


@pytest.mark.parametrize(
  'change, words',
  [
    ({'model_type': 'mistral'}, "model_type 'mistral' is not supported.*qwen3 or llama"),
    ({'model_type': None}, 'model_type None'),
    ({'rope_scaling': LLAMA3}, "RoPE of type 'llama3'"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "RoPE of type 'yarn'"),
    ({'rope_parameters': LLAMA3 | {'rope_theta': 5e5}}, "RoPE of type 'llama3'"),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial rotary'),
    ({'attention_bias': True}, 'attention bias'),
    ({'mlp_bias': True}, 'MLP bias'),
    ({'hidden_act': 'gelu'}, "activation 'gelu'"),
    ({'quantization_config': {'bits': 4}}, 'quantised'),
    ({'use_sliding_window': True, 'sliding_window': 64, 'max_window_layers': 20}, 'sliding-window'),
    (
      {
        'use_sliding_window': True,
        'sliding_window': 64,
        'layer_types': ['full_attention'] * 27 + ['sliding_attention'],
      },
      'sliding-window',
    ),
    ({'hidden_size': None, 'vocab_size': None}, 'lacks vocab_size, hidden_size'),
    ({'num_key_value_heads': 3}, 'multiple'),
    ({'head_dim': 15}, 'even'),
  ],
)
def test_what_is_not_computed_is_an_error(change, words):
  with pytest.raises(UserError, match=words):
    DecoderConfig.from_hf(OLD | change)


@pytest.mark.parametrize(
  'change',
  [
    {'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 0},
    {'use_sliding_window': True, 'sliding_window': 4096, 'max_window_layers': 28},
    {'rope_scaling': {'rope_type': 'default'}},
  ],
)
def test_an_option_that_is_off_is_no_error(change):
  assert DecoderConfig.from_hf(OLD | change) == DecoderConfig.from_hf(OLD)
