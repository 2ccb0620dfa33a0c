"""Fewer slots than completions: the same completions, in fewer steps than their batches take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dopd_jax import sharding
from dopd_jax.errors import UserError
from dopd_jax.rollout import Sampling, StopReason, caches
from dopd_jax.rollout.sampler import make_generate
from tests.models import tiny
from tests.rollout import toy

V = tiny.V
LENGTHS = (5, 12, 1, 9, 3, 7)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision('highest'):
    yield


@functools.cache
def run(slots, M=3, N=30, stop_ids=range(6), prompts=LENGTHS, side='left', kind='qwen3-tied', **s):
  model, params = tiny.model(kind)
  rng = np.random.default_rng(0)
  tokens, valid = toy.pad_prompts([rng.integers(0, V, n).tolist() for n in prompts], 4, pad_id=0)
  if side == 'right':
    tokens, valid = tokens[:, ::-1], valid[:, ::-1]
  sampling = Sampling(max_new_tokens=N, num_samples=M, slots=slots, **s)
  generate = make_generate(model, sampling, stop_ids=stop_ids, pad_id=0, live_vocab=V)
  rollout, steps = jax.jit(generate)(
    params, tokens, valid, jax.random.key(0), np.arange(len(prompts))
  )
  return jax.tree.map(np.asarray, rollout), int(steps)


def assert_same(one, other, tolerance=1e-5):
  for name in ('tokens', 'mask', 'stop_reason'):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
  np.testing.assert_allclose(one.logp, other.logp, atol=tolerance)
  np.testing.assert_allclose(one.behaviour_logp, other.behaviour_logp, atol=tolerance)


@pytest.mark.parametrize('kind, slots', [('qwen3-tied', 1), ('qwen3-tied', 5), ('llama', 17)])
def test_the_slots_change_nothing(kind, slots):
  all_at_once, _ = run(0, kind=kind)
  lengths = all_at_once.mask.sum(axis=1)
  # Uneven, and some run to the end.
  assert lengths.min() <= 3 and lengths.max() == 30 and len(set(lengths)) > 6
  assert set(all_at_once.stop_reason) == {StopReason.STOP, StopReason.LENGTH}
  few, steps = run(slots, kind=kind)
  assert_same(all_at_once, few)
  busy = (lengths - 1).sum()  # the first token needs no step
  assert busy / slots <= steps - 1 <= busy / slots + 29


@pytest.mark.parametrize(
  'settings',
  [
    dict(M=1),
    dict(side='right'),
    dict(stop_ids=()),
    dict(N=1),
    dict(N=2),
    dict(temperature=0.0),
    dict(temperature=0.7, top_k=20, top_p=0.9, loss_temperature=1.3),
    dict(prompts=(5, 0, 12, 0, 0, 3)),  # fillers
  ],
  ids=str,
)
def test_with_other_settings(settings):
  assert_same(run(0, **settings)[0], run(2, **settings)[0])


def test_a_growing_cache(monkeypatch):
  plain, _ = run(0, N=60)
  monkeypatch.setattr(caches, '_SHORTEST', 5)
  assert caches.lengths(12, 60) == [17, 35, 71]
  few, steps = run(2, N=60)
  assert_same(plain, few)
  assert steps > 60 + 60  # so that the ring closes more than once


def test_int8():
  # The last bit of a sum, which depends on the column, may turn into another int8.
  assert_same(run(0, kv_cache='int8')[0], run(4, kv_cache='int8')[0], tolerance=5e-3)


def test_as_many_slots_as_completions_is_off():
  settings = dict(M=2, prompts=(3, 4), N=4)
  for slots in (4, 100):
    assert run(slots, **settings)[1] == run(0, **settings)[1]


def test_the_loop_ends_when_all_have_stopped():
  # Lengths 3, 2, 6, 1: two slots take 2 + 1 and 5 steps behind the first tokens.
  rows = [[7, 8, 3], [11, 5], [21, 22, 23, 24, 25, 3], [3]]
  model, params, prompts = toy.script(rows, 64)
  sampling = Sampling(max_new_tokens=50, slots=2)
  generate = jax.jit(make_generate(model, sampling, stop_ids=[3, 5], pad_id=9, live_vocab=64))
  rollout, steps = generate(
    params, prompts, jnp.ones(prompts.shape, bool), jax.random.key(0), jnp.arange(4)
  )
  assert rollout.mask.sum(axis=1).tolist() == [3, 2, 6, 1]
  assert [row[:n].tolist() for row, n in zip(rollout.tokens, (3, 2, 6, 1))] == rows
  assert (rollout.stop_reason == StopReason.STOP).all()
  assert steps == 1 + 1 + 5  # the third waits for the second


def test_rows_over_devices():
  """Three slots on two devices, each of which has half of the prompts."""
  model, params = tiny.model()
  tokens = np.random.default_rng(0).integers(0, V, (4, 5))
  arguments = (params, tokens, np.ones((4, 5), bool), jax.random.key(0), np.arange(4))

  def sample(slots, arguments):
    sampling = Sampling(max_new_tokens=20, num_samples=2, slots=slots)
    generate = make_generate(model, sampling, stop_ids=range(6), pad_id=0, live_vocab=V)
    return jax.jit(generate)(*arguments)[0]

  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  whole, rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), sharding.ROWS))
  with jax.set_mesh(mesh):
    few = sample(3, jax.device_put(arguments, (whole, rows, rows, whole, rows)))
  assert_same(sample(0, arguments), jax.device_get(few))


@pytest.mark.parametrize('slots', [-1, 2.0, True])
def test_slots_that_are_none(slots):
  with pytest.raises(UserError, match='slots'):
    Sampling(max_new_tokens=3, slots=slots)
