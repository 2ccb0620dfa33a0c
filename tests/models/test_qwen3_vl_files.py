"""Qwen3-VL's Hugging Face directories: round trips, configs old and new, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dopd_jax.errors import UserError
from dopd_jax.models import DecoderConfig, build, load, save
from tests.models import tiny_vl
from tests.models.tiny_vl import END, START, image, video


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('max_shard_bytes', [5e9, 40_000])
def test_import_then_export_is_the_identity(tied, max_shard_bytes, tmp_path):
  """Bit for bit what transformers wrote, which transformers loads again."""
  import torch
  import transformers

  peer = tiny_vl.torch_model(tied=tied)
  peer.save_pretrained(tmp_path / 'theirs')
  config, params = load(tmp_path / 'theirs')
  save(tmp_path / 'ours', config, params, max_shard_bytes=max_shard_bytes)
  theirs = load_file(tmp_path / 'theirs/model.safetensors')
  ours = {}
  for file in (tmp_path / 'ours').glob('*.safetensors'):
    ours |= load_file(file)
  assert ours.keys() == theirs.keys() and ('lm_head.weight' in ours) != tied
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)

  again, report = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
    tmp_path / 'ours', dtype=torch.float32, output_loading_info=True
  )
  assert not report['missing_keys'] and not report['unexpected_keys']
  assert not report['mismatched_keys']
  data = tiny_vl.batch([[3, image(1, 4, 6), 2, video(2, 4, 4), 1]])
  np.testing.assert_array_equal(
    tiny_vl.torch_logits(again.eval(), data), tiny_vl.torch_logits(peer, data)
  )


def test_export_then_import_is_the_identity(tmp_path):
  """Of a random model whose biases are zero: that is no fault of a file."""
  config = tiny_vl.config()
  params = jax.jit(build(config).init)(jax.random.key(0))
  save(tmp_path / 'out', config, params)
  again, loaded = load(tmp_path / 'out')
  assert again == config
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_configs_that_transformers_wrote(tmp_path):
  """As the published files were written by transformers 4.57, and by 5."""
  peer = tiny_vl.torch_model()
  peer.config.save_pretrained(tmp_path)
  new = json.loads((tmp_path / 'config.json').read_text())
  config = DecoderConfig.from_hf(new)
  text = dict(new['text_config'])
  rope = text.pop('rope_parameters')
  old = {k: v for k, v in new.items() if k != 'text_config'}
  old['text_config'] = text | {
    'rope_theta': rope.pop('rope_theta'),
    'rope_scaling': rope,
    'vocab_size': tiny_vl.V,
  }
  old['vision_config'] = {
    k: v for k, v in new['vision_config'].items() if k != 'rope_parameters'
  } | {'model_type': 'qwen3_vl'}
  # The size of the vocabulary that counts is the nested one.
  old['vocab_size'] = 7
  assert DecoderConfig.from_hf(old) == config
  assert (config.vocab_size, config.image_token_id) == (tiny_vl.V, tiny_vl.IMAGE)
  assert config.mrope_section == tiny_vl.SECTION and config.model_type == 'qwen3_vl'
  assert config.vision.deepstack_indexes == tiny_vl.DEEPSTACK
  assert (config.vision_start_token_id, config.vision_end_token_id) == (START, END)
  assert config.eos_token_ids == (2,) and config.tie_word_embeddings


def _with(hf, part, **changes):
  return hf | {part: hf[part] | changes}


BROKEN = {
  'not interleaved': (
    lambda hf: _with(hf, 'text_config', rope_parameters={'mrope_interleaved': False}),
    'M-RoPE that is not interleaved',
  ),
  'V15 sections': (
    lambda hf: _with(hf, 'text_config', rope_parameters={'mrope_section': [4, 4, 4]}),
    r'\(4, 4, 4\) must add up to head_dim / 2 = 8',
  ),
  'yarn': (
    lambda hf: _with(hf, 'text_config', rope_parameters={'rope_type': 'yarn'}),
    "RoPE of type 'yarn'",
  ),
  'activation': (
    lambda hf: _with(hf, 'vision_config', hidden_act='silu'),
    "vision activation 'silu'",
  ),
  'patch': (
    lambda hf: _with(hf, 'vision_config', patch_size=[4, 4]),
    'patches that are not square',
  ),
  'width': (
    lambda hf: _with(hf, 'vision_config', out_hidden_size=64),
    'out_hidden_size=64 .*hidden_size=48',
  ),
  'heads': (lambda hf: _with(hf, 'vision_config', num_heads=3), 'multiple of 4 x num_heads=3'),
  'grid': (
    lambda hf: _with(hf, 'vision_config', num_position_embeddings=35),
    '35 must be a square number',
  ),
  'order': (
    lambda hf: _with(hf, 'vision_config', deepstack_visual_indexes=[2, 0]),
    r'deepstack_indexes=\(2, 0\) must rise',
  ),
  'depth': (lambda hf: _with(hf, 'vision_config', depth=2), 'must rise, within 0 to 1'),
  'no tower': (lambda hf: hf | {'vision_config': None}, 'vision_config lacks depth'),
  'mixture': (lambda hf: hf | {'model_type': 'qwen3_vl_moe'}, "'qwen3_vl_moe' is not supported"),
  'quantised': (lambda hf: hf | {'quantization_config': {'bits': 4}}, 'quantised'),
  'text alone': (
    lambda hf: hf['text_config'] | {'model_type': 'qwen3'},
    'M-RoPE without a vision tower',
  ),
}


@pytest.mark.parametrize('fault', BROKEN)
def test_what_is_not_computed_is_an_error(fault):
  change, words = BROKEN[fault]
  with pytest.raises(UserError, match=words):
    DecoderConfig.from_hf(change(tiny_vl.config().to_hf()))


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda t: t.pop('model.visual.blocks.1.attn.qkv.bias'), 'No weight file holds .*qkv.bias'),
    (
      lambda t: t.update({'model.visual.blocks.3.norm1.bias': np.ones(32, np.float32)}),
      'blocks.3.norm1.bias in .* match no parameter of this qwen3_vl',
    ),
    (
      lambda t: t.update({'model.visual.patch_embed.proj.weight': np.ones((32, 96), np.float32)}),
      r'patch_embed.proj.weight .* \(32, 96\), but config.json makes it \(32, 3, 2, 4, 4\)',
    ),
  ],
)
def test_a_broken_tensor_of_the_tower_is_named(change, words, tmp_path):
  model, params = tiny_vl.model()
  save(tmp_path / 'out', model.config, params)
  tensors = load_file(tmp_path / 'out/model.safetensors')
  change(tensors)
  save_file(tensors, tmp_path / 'out/model.safetensors')
  with pytest.raises(UserError, match=words):
    load(tmp_path / 'out')
