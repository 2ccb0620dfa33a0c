"""Rows sorted by length within their device, and micro-batches no wider than they must be."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import microbatches, sharding
from dopd_jax.microbatches import at_width, over_micro_batches, over_rows_by_length, widths
from tests import test_step


@pytest.mark.parametrize('T', [1, 127, 128, 129, 512, 513, 1_000, 5_120])
def test_widths(T):
  found = widths(T)
  assert found[-1] == T and list(found) == sorted(set(found)) and len(found) <= 4
  assert all(w % 128 == 0 for w in found[:-1])
  for a, b in itertools.pairwise(found):
    assert b - a < T / 4 + 128


def test_the_least_width_that_holds_the_longest_row():
  ask = jax.jit(lambda longest: at_width(jnp.int32, 1_000, longest))
  assert widths(1_000) == (256, 512, 768, 1_000)
  for longest, width in (
    (1, 256),
    (256, 256),
    (257, 512),
    (768, 768),
    (769, 1_000),
    (1_000, 1_000),
  ):
    assert ask(longest) == width


def test_rows_of_about_one_length_meet_on_their_own_device():
  mesh = sharding.make_mesh(2, 2, 2)
  length = jnp.array(np.random.default_rng(0).permutation(32), jnp.int32)
  seen = lambda x: {'own': x, 'longest': jnp.full(x.shape, jnp.max(x))}

  with jax.set_mesh(mesh):
    placed = jax.device_put(length, sharding.rows(mesh))
    found = jax.jit(lambda x: over_rows_by_length(seen, x, x, 8))(placed)
  np.testing.assert_array_equal(found['own'], length)  # each row has its own result
  a_shard = np.asarray(length).reshape(4, 8)
  want = np.sort(a_shard, axis=1).reshape(4, 4, 2).max(axis=(0, 2))  # 4 shards, 4 passes of 2 rows
  place = np.argsort(np.argsort(a_shard, axis=1), axis=1) // 2
  np.testing.assert_array_equal(found['longest'], want[place].reshape(-1))


def test_sorting_moves_nothing_between_devices():
  """What crosses the mesh is a number: the longest row of a micro-batch."""
  mesh = sharding.make_mesh(4, 2, 1)
  x = jax.ShapeDtypeStruct((64, 3, 5), jnp.float32, sharding=sharding.rows(mesh))
  length = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=sharding.rows(mesh))
  run = lambda x, n: over_rows_by_length(lambda y: y[0] * jnp.max(y[1]), (x, n), n, 16)
  with jax.set_mesh(mesh):
    program = jax.jit(run).lower(x, length).compile().as_text()
  moved = re.findall(r'= (\S+) (?:all-\w+|collective-\w+|reduce-scatter)\(', program)
  assert moved and all(shape.startswith('s32[]') for shape in moved), moved


def test_results_are_written_in_their_rows():
  """Hidden states of a batch are the largest thing that score makes: they have room once."""
  mesh = sharding.make_mesh(4, 2, 1)
  put = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.rows(mesh))
  large = lambda x: jnp.broadcast_to(x[0][..., None], (*x[0].shape, 256)) * jnp.max(x[1])
  by_length = lambda x, n: over_rows_by_length(large, (x, n), n, 16)
  as_dealt = lambda x, n: over_micro_batches(large, (x, n), 16)
  for run in (by_length, as_dealt):
    with jax.set_mesh(mesh):
      memory = jax.jit(run).lower(put(128, 64), put(128)).compile().memory_analysis()
    results = 128 * 64 * 256 * 4 // 8
    assert memory.output_size_in_bytes == results
    assert memory.temp_size_in_bytes < results / 4  # one micro-batch is an eighth


def test_widths_and_order_change_no_signal(monkeypatch):
  batch = test_step.make_batch()
  _, _, want, _, _ = test_step.base()
  monkeypatch.setattr(microbatches, 'LANES', 4)
  monkeypatch.setattr(microbatches, 'WIDTHS', 2)
  assert widths(13) == (8, 13)
  mesh = sharding.make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    _, _, found, _, _ = test_step.run(batch=batch, microbatch=4, mesh=mesh)
  mask = np.asarray(batch.mask)
  for name in want.signals:
    for a, b in zip(*map(jax.tree.leaves, (found.signals[name], want.signals[name]))):
      np.testing.assert_allclose(np.asarray(a)[mask], np.asarray(b)[mask], atol=1e-5)
  np.testing.assert_array_equal(found.plan.regime, want.plan.regime)
