"""Published parameter counts, from shapes alone: nothing is allocated."""

import math

import jax
import pytest

from dopd_jax.models import PRESETS, DecoderConfig, build

PUBLISHED = {
  'qwen3-0.6b': 596_049_920,
  'qwen3-1.7b': 1_720_574_976,
  'qwen3-4b': 4_022_468_096,
  'qwen3-8b': 8_190_735_360,
  'qwen3-vl-2b': 2_127_532_032,
  'qwen3-vl-4b': 4_437_815_808,
  'qwen3-vl-8b': 8_767_123_696,
  'qwen3-vl-32b': 33_357_390_064,
  'smollm2-135m': 134_515_008,
}


def test_every_preset_is_counted():
  assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_count(name):
  shapes = jax.eval_shape(build(PRESETS[name]).init, jax.random.key(0))
  leaves = jax.tree.leaves(shapes)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == PUBLISHED[name]


@pytest.mark.parametrize('name', PUBLISHED)
def test_forward_and_head_shapes(name):
  config = PRESETS[name]
  model = build(config)
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((2, 5), 'int32')
  valid = jax.ShapeDtypeStruct((2, 5), 'bool')
  cache = jax.eval_shape(lambda: model.init_cache(2, 8))
  hidden, new = jax.eval_shape(
    lambda p, t, v, c: model.forward(p, t, v, cache=c), params, tokens, valid, cache
  )
  assert hidden.shape == (2, 5, config.hidden_size)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
    lambda x: (x.shape, x.dtype), cache
  )
  head = jax.eval_shape(model.head, params)
  assert head.shape == (config.vocab_size, config.hidden_size)


def test_head_width_is_not_hidden_over_heads():
  shapes = jax.eval_shape(build(PRESETS['qwen3-0.6b']).init, jax.random.key(0))
  assert shapes['layers']['attention']['q_proj'].shape == (28, 1024, 16, 128)  # 2,048 out


@pytest.mark.parametrize('name', PUBLISHED)
def test_configs_survive_the_format(name):
  assert DecoderConfig.from_hf(PRESETS[name].to_hf()) == PRESETS[name]
