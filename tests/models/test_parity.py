"""Logits against transformers in float32, to 1e-4."""

import jax
import numpy as np
import pytest

from dopd_jax.models import build, layers, load, save
from tests.models import tiny

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module', params=tiny.KINDS)
def pair(request, tmp_path_factory):
  """A transformers model and what we load of its directory."""
  directory = tmp_path_factory.mktemp(request.param)
  peer = tiny.torch_model(request.param)
  peer.save_pretrained(directory)
  config, params = load(directory)
  return peer, build(config), params


def difference(pair, tokens, valid, positions=None):
  peer, model, params = pair
  ours = tiny.logits(model, params, tokens, valid, positions)
  theirs = tiny.torch_logits(peer, tokens, valid, positions)
  assert np.std(theirs[valid]) > 0.5  # a flat peer would agree with anything
  return np.abs(np.asarray(ours) - theirs)[valid].max()


@pytest.mark.parametrize('side', ['left', 'right'])
def test_ragged_rows(pair, side):
  tokens, valid = tiny.batch([17, 9, 1, 13], 17, side)
  assert difference(pair, tokens, valid) < TOLERANCE


def test_padding_on_both_sides(pair):
  tokens, valid = tiny.batch([17, 12, 9], 17, 'left')
  valid[1, -3:] = valid[2, -1:] = False
  assert difference(pair, tokens, valid) < TOLERANCE


def test_past_position_1000(pair):
  tokens, valid = tiny.batch([1100], 1100)
  assert difference(pair, tokens, valid) < TOLERANCE


def test_given_positions(pair):
  tokens, valid = tiny.batch([8, 8], 8)
  positions = np.arange(8)[None, :] + np.array([[1000], [3]])
  assert difference(pair, tokens, valid, positions) < TOLERANCE


def test_rope_base_is_read(tmp_path):
  tokens, valid = tiny.batch([1010], 1010)
  other = {'rope_parameters': {'rope_theta': 10_000.0, 'rope_type': 'default'}}
  peer = tiny.torch_model('llama', **other)
  peer.save_pretrained(tmp_path)
  config, params = load(tmp_path)
  assert config.rope_theta == 10_000.0
  assert difference((peer, build(config), params), tokens, valid) < TOLERANCE
  wrong = build(tiny.config('llama', rope_theta=1e6))
  assert difference((peer, wrong, params), tokens, valid) > 1e-2


def test_norm_after_rope_would_be_seen(pair, monkeypatch):
  """The peer tells q/k norm before RoPE from the same norm after it."""
  peer, model, params = pair
  if not model.config.qk_norm:
    assert 'q_norm' not in params['layers']['attention']
    return
  tokens, valid = tiny.batch([9, 7], 9)
  rotate, norm = layers.rope, layers.rms_norm
  # A norm over a head is put off until RoPE is done.
  late = []

  def put_off(x, scale, eps):
    if x.ndim != 4:
      return norm(x, scale, eps)
    late.append((scale, eps))
    return x

  def rope_then_norm(x, angles):
    return norm(rotate(x, angles), *late.pop(0))

  monkeypatch.setattr(layers, 'rms_norm', put_off)
  monkeypatch.setattr(layers, 'rope', rope_then_norm)
  assert difference((peer, build(model.config), params), tokens, valid) > 1e-2


@pytest.mark.parametrize('kind', tiny.KINDS)
@pytest.mark.parametrize('max_shard_bytes', [5e9, 40_000])
def test_transformers_loads_the_export(kind, max_shard_bytes, tmp_path):
  import torch
  import transformers

  model, params = tiny.model(kind)
  save(tmp_path / 'out', model.config, params, max_shard_bytes=max_shard_bytes)
  peer, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', dtype=torch.float32, output_loading_info=True
  )
  assert not report['missing_keys'] and not report['unexpected_keys']
  assert not report['mismatched_keys']
  assert peer.config.eos_token_id == [3, 5] == peer.generation_config.eos_token_id
  assert peer.config.pad_token_id == 0
  tokens, valid = tiny.batch([12, 7], 12, 'left')
  assert difference((peer.eval(), model, params), tokens, valid) < TOLERANCE
