"""Hugging Face directories: round trips, and each way in which one can be broken."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dopd_jax import sharding
from dopd_jax.errors import UserError
from dopd_jax.models import load, save
from tests.models import tiny

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
TABLE, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


@pytest.fixture
def saved(tmp_path):
  """A function that writes a tiny model's directory: kind, save's options -> directory."""

  def write(kind='qwen3-tied', **options):
    model, params = tiny.model(kind)
    save(tmp_path / kind, model.config, params, **options)
    return tmp_path / kind

  return write


def edit(directory, change, file=WEIGHTS):
  """Rewrites a weight file by a function of its dict of tensors."""
  tensors = load_file(directory / file)
  change(tensors)
  save_file(tensors, directory / file)


def edit_json(file, **changes):
  content = json.loads(file.read_text())
  file.write_text(json.dumps({**content, **changes}))


def equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('kind', tiny.KINDS)
@pytest.mark.parametrize('max_shard_bytes', [5e9, 40_000])
def test_export_then_import_is_the_identity(kind, max_shard_bytes, saved):
  model, params = tiny.model(kind)
  directory = saved(kind, max_shard_bytes=max_shard_bytes)
  config, again = load(directory)
  assert config == model.config
  equal(again, params)
  files = sorted(directory.glob('*.safetensors'))
  assert (len(files) > 1) == (directory / INDEX).exists() == (max_shard_bytes < 1e9)
  assert all(file.stat().st_size < max_shard_bytes + 10_000 for file in files)
  if len(files) > 1:
    index = json.loads((directory / INDEX).read_text())
    assert index['metadata']['total_size'] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert set(index['weight_map'].values()) == {file.name for file in files}


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_import_then_export_is_the_identity(kind, tmp_path):
  """Bit for bit what transformers wrote, under the same names."""
  tiny.torch_model(kind).save_pretrained(tmp_path / 'theirs')
  save(tmp_path / 'ours', *load(tmp_path / 'theirs'))
  theirs, ours = (load_file(tmp_path / who / WEIGHTS) for who in ('theirs', 'ours'))
  assert ours.keys() == theirs.keys()
  assert (HEAD in ours) == (kind == 'qwen3-untied')  # a tied head is one tensor
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize('kind', ['qwen3-untied', 'llama'])
def test_loads_straight_into_the_sharded_tree(kind, sizes, saved):
  mesh = sharding.make_mesh(*sizes)
  _, params = tiny.model(kind)
  _, sharded = load(saved(kind), mesh=mesh)
  equal(sharded, params)
  wanted = sharding.param_shardings(params, mesh)
  for leaf, where in zip(jax.tree.leaves(sharded), jax.tree.leaves(wanted)):
    assert leaf.sharding == where
    assert leaf.addressable_shards[0].data.shape == where.shard_shape(leaf.shape)


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_float32(dtype, saved):
  _, params = tiny.model()
  directory = saved()
  edit(directory, lambda t: t.update({name: x.astype(dtype) for name, x in t.items()}))
  _, loaded = load(directory)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
  equal(loaded, jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params))


def test_parameters_in_another_dtype(saved, tmp_path):
  _, params = tiny.model()
  config, half = load(saved(), dtype=jnp.bfloat16)
  equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  save(tmp_path / 'half', config, half)
  assert json.loads((tmp_path / 'half/config.json').read_text())['dtype'] == 'bfloat16'
  equal(load(tmp_path / 'half', dtype=jnp.bfloat16)[1], half)


def test_a_padded_vocabulary_is_kept(tmp_path):
  model, params = tiny.model(vocab_size=128)
  save(tmp_path / 'padded', model.config, params)
  config, again = load(tmp_path / 'padded')
  assert config.vocab_size == again['embedding'].shape[0] == 128


def test_one_embedding_row_moves_lookup_and_head(saved):
  directory = saved()

  def push(tensors):
    tensors[TABLE][7] += 1

  edit(directory, push)
  model, params = tiny.model()
  _, pushed = load(directory)
  tokens, valid = np.array([[7, 1]]), np.ones((1, 2), bool)
  before = np.asarray(tiny.logits(model, params, tokens, valid))
  after = np.asarray(tiny.logits(model, pushed, tokens, valid))
  assert np.abs(after - before)[0, 1, :7].max() > 1e-3  # through the lookup
  tokens = np.array([[2, 1]])
  before = np.asarray(tiny.logits(model, params, tokens, valid))
  after = np.asarray(tiny.logits(model, pushed, tokens, valid))
  np.testing.assert_array_equal(np.flatnonzero(np.any(after != before, axis=(0, 1))), [7])


def test_a_tied_head_that_is_written_out(saved):
  directory = saved()
  edit(directory, lambda t: t.update({HEAD: t[TABLE].copy()}))
  equal(load(directory)[1], tiny.model()[1])
  edit(directory, lambda t: t.update({HEAD: t[TABLE] + 1}))
  with pytest.raises(UserError, match=r'lm_head.weight in .* differs from the embedding'):
    load(directory)


def test_names_without_the_prefix_and_old_buffers(saved):
  directory = saved()

  def rename(tensors):
    for name in list(tensors):
      tensors[name.removeprefix('model.')] = tensors.pop(name)
    tensors['layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(8, np.float32)

  edit(directory, rename)
  equal(load(directory)[1], tiny.model()[1])


def test_stop_ids_of_both_files(saved):
  directory = saved()
  edit_json(directory / 'config.json', eos_token_id=5)
  edit_json(directory / 'generation_config.json', eos_token_id=[9, 5], temperature=0.6, top_k=20)
  config, _ = load(directory)
  assert config.eos_token_ids == (9, 5)
  assert not {'temperature', 'top_k'} & set(vars(config))
  edit_json(directory / 'config.json', eos_token_id=7)
  edit_json(directory / 'generation_config.json', eos_token_id=9)
  assert load(directory)[0].eos_token_ids == (9, 7)
  (directory / 'generation_config.json').unlink()
  assert load(directory)[0].eos_token_ids == (7,)


# What a broken directory gets: (kind, how it is broken, words of the sentence).
def _nan(t):
  t['model.layers.1.mlp.up_proj.weight'][3, 2] = np.nan


def _inf(t):
  t['model.norm.weight'][0] = np.inf


def _zero(t, name=TABLE):
  t[name][:] = 0


def _narrow(t):
  t['model.layers.2.self_attn.q_proj.weight'] = np.ones((48, 48), np.float32)


def _one_more_layer(t):
  t['model.layers.3.mlp.up_proj.weight'] = t['model.layers.2.mlp.up_proj.weight'].copy()


def _quantised(t):
  t[TABLE] = t[TABLE].astype(np.int8)


BROKEN = {
  'nan': ('llama', _nan, r'layers.1.mlp.up_proj.weight in .*model.safetensors holds NaN'),
  'inf': ('llama', _inf, r'model.norm.weight in .* holds NaN or infinite'),
  'zero': ('qwen3-tied', _zero, r'embed_tokens.weight in .* is all zeros'),
  'zero head': ('qwen3-untied', lambda t: _zero(t, HEAD), r'lm_head.weight in .* is all zeros'),
  'shape': ('llama', _narrow, r'layers.2.self_attn.q_proj.weight .* shape \(48, 48\).*\(64, 48\)'),
  'missing': (
    'llama',
    lambda t: t.pop('model.layers.1.mlp.up_proj.weight'),
    'No weight file holds model.layers.1.mlp.up_proj.weight',
  ),
  'no head': ('qwen3-untied', lambda t: t.pop(HEAD), r'No weight file holds lm_head.*not tied'),
  'two': (
    'llama',
    lambda t: t.update({'norm.weight': t['model.norm.weight'].copy()}),
    'model.norm.weight and norm.weight in .* are the same parameter',
  ),
  'bias': (
    'llama',
    lambda t: t.update({'model.layers.0.self_attn.q_proj.bias': np.ones(64, np.float32)}),
    'self_attn.q_proj.bias in .* match no parameter',
  ),
  'norms of another family': (
    'llama',
    lambda t: t.update(
      {f'model.layers.{i}.self_attn.{m}_norm.weight': np.ones(16) for i in range(3) for m in 'qk'}
    ),
    r'_norm.weight and 3 more in .* match no parameter of this llama',
  ),
  'deeper': ('llama', _one_more_layer, 'layers.3.mlp.up_proj.weight .* with 3 layers'),
  'quantised': ('llama', _quantised, 'embed_tokens.weight in .* is of type I8.*not quantised'),
}


@pytest.mark.parametrize('fault', BROKEN)
def test_a_broken_tensor_is_named(fault, saved):
  kind, change, words = BROKEN[fault]
  directory = saved(kind)
  edit(directory, change)
  with pytest.raises(UserError, match=words):
    load(directory)


def test_transformers_own_export_of_another_family_is_refused(tmp_path):
  tiny.torch_model('llama', attention_bias=True).save_pretrained(tmp_path)
  with pytest.raises(UserError, match=r'config.json: This llama model uses attention bias'):
    load(tmp_path)


@pytest.mark.parametrize('size', [0, 5, 200, -1])
def test_a_truncated_file_is_named(size, saved):
  file = saved() / WEIGHTS
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(UserError, match=r'model.safetensors is not a complete safetensors file'):
    load(file.parent)


def test_missing_files_are_named(saved, tmp_path):
  directory = saved(max_shard_bytes=40_000)
  second = next(directory.glob('model-00002-*'))
  content = second.read_bytes()
  second.unlink()
  with pytest.raises(UserError, match=r'The weight file .*model-00002-of-.* does not exist'):
    load(directory)
  second.write_bytes(content)
  first = next(directory.glob('model-00001-*'))
  edit(directory, lambda t: t.pop(TABLE), first.name)
  with pytest.raises(UserError, match=r'index.json lists model.embed_tokens.weight, which no file'):
    load(directory)
  edit(directory, lambda t: t.update({'x': np.ones(1)}), first.name)
  edit(directory, lambda t: t.update({'x': np.ones(1)}), second.name)
  with pytest.raises(UserError, match='x is in both'):
    load(directory)
  (directory / INDEX).unlink()
  with pytest.raises(UserError, match=r'The weight file .*/model.safetensors does not exist'):
    load(directory)
  (directory / 'config.json').write_text('{"model_type": ')
  with pytest.raises(UserError, match=r'config.json is not valid JSON'):
    load(directory)
  (directory / 'config.json').unlink()
  with pytest.raises(UserError, match=r'config.json does not exist'):
    load(directory)
  with pytest.raises(UserError, match=r'The model directory .*/nowhere does not exist'):
    load(tmp_path / 'nowhere')
  (tmp_path / 'x.gguf').write_text('')
  with pytest.raises(UserError, match=r'x.gguf is a file.*gguf.convert'):
    load(tmp_path / 'x.gguf')


def test_a_hub_name(saved, monkeypatch):
  import huggingface_hub

  directory = saved()
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: str(directory))
  equal(load('owner/name-1.5')[1], tiny.model()[1])

  def offline(name, **_):
    raise OSError('no network.\nMany more lines')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  with pytest.raises(UserError, match=r'owner/name is not a directory, .* \(no network\): give'):
    load('owner/name')


def test_a_full_directory_is_not_overwritten(saved):
  directory = saved()
  before = {file: file.read_bytes() for file in directory.iterdir()}
  with pytest.raises(UserError, match='exists and is not an empty directory'):
    saved()
  assert before == {file: file.read_bytes() for file in directory.iterdir()}


def test_a_failed_export_leaves_nothing(tmp_path):
  model, params = tiny.model()

  class Unsaved:
    def save_pretrained(self, directory):
      assert (directory / WEIGHTS).exists()
      raise OSError('No space left on device')

  with pytest.raises(UserError, match=r'out could not be written \(No space left on device\)'):
    save(tmp_path / 'out', model.config, params, tokenizer=Unsaved())
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='could not be written'):
    save(tmp_path / 'file/out', model.config, params)
  (tmp_path / 'empty').mkdir()
  save(tmp_path / 'empty', model.config, params)  # an empty directory is no obstacle
  load(tmp_path / 'empty')
