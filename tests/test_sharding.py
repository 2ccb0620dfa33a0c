"""The mesh, one rule a parameter, and results that don't depend on either."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dopd_jax import sharding
from dopd_jax.errors import UserError
from dopd_jax.models import PRESETS, build
from tests.models import tiny


@pytest.mark.parametrize(
  'asked, shape',
  [
    ({}, (8, 1, 1)),
    ({'fsdp': 4}, (2, 4, 1)),
    ({'data': 1, 'fsdp': -1, 'tensor': 2}, (1, 4, 2)),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
    ({'data': 1, 'fsdp': 1, 'tensor': -1}, (1, 1, 8)),
  ],
)
def test_mesh(asked, shape):
  mesh = sharding.make_mesh(**asked)
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')
  assert mesh.devices.shape == shape
  assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
  'asked, words',
  [
    ({'fsdp': 3}, r'data=-1, fsdp=3, tensor=1 does not fit 8 devices.*1, 2, 4, 8'),
    ({'data': 2, 'fsdp': 2}, r'does not fit 8 devices'),
    ({'data': 16}, r'does not fit 8 devices'),
    ({'fsdp': -1}, r'-1 at most once'),
    ({'fsdp': 0}, r'must be positive'),
  ],
)
def test_a_mesh_that_does_not_fit(asked, words):
  with pytest.raises(UserError, match=words):
    sharding.make_mesh(**asked)


@dataclasses.dataclass(frozen=True)
class OfASlice:
  id: int
  slice_index: int
  platform: str
  device_kind: str = 'fake'


def test_between_slices_and_nodes_runs_the_data_axis():
  parts = lambda mesh: [{device.slice_index for device in part.flat} for part in mesh.devices]
  tpus = [OfASlice(i, i % 2, 'tpu') for i in range(8)]
  with pytest.raises(UserError, match=r'mesh.data \(1\) must be a multiple of the 2 slices'):
    sharding.make_mesh(1, -1, 2, devices=tpus)
  nodes = [OfASlice(i, i % 2, 'gpu') for i in range(8)]
  mesh = sharding.make_mesh(2, -1, 2, devices=nodes)
  assert mesh.axis_names == sharding.AXES and mesh.devices.shape == (2, 2, 2)
  assert parts(mesh) == [{0}, {1}]
  # Parameters may be split over nodes of GPUs.
  assert parts(sharding.make_mesh(1, -1, 2, devices=nodes)) == [{0, 1}]


def shapes(config):
  return jax.eval_shape(build(config).init, jax.random.key(0))


@pytest.mark.parametrize('name', PRESETS)
def test_every_parameter_matches_exactly_one_rule(name):
  tree = shapes(PRESETS[name])
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    rule = sharding.spec(jax.tree_util.keystr(path, simple=True, separator='/'))
    assert len(rule) == len(leaf.shape)
  for sizes in ((1, 8, 1), (2, 2, 2), (1, 1, 8)):
    mesh = sharding.make_mesh(*sizes)
    where = sharding.param_shardings(tree, mesh)
    # Every matrix of the Qwen3 models is split by all of fsdp and tensor: nothing large is whole.
    for leaf, spread in zip(jax.tree.leaves(tree), jax.tree.leaves(where)):
      part = np.prod(spread.shard_shape(leaf.shape)) * sizes[1] * sizes[2]
      whole = leaf.ndim < 3 and leaf.shape[-1] < 10_000
      if name.startswith('qwen3') and not whole:
        assert part == np.prod(leaf.shape)


def test_every_rule_is_used():
  names = set()
  for config in (tiny.config('qwen3-untied'), tiny.config('llama'), PRESETS['qwen3-vl-2b']):
    leaves = jax.tree_util.tree_leaves_with_path(shapes(config))
    names |= {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves}
  used = [any(sharding.spec(name) is rule for name in names) for _, rule in sharding.RULES]
  assert all(used), sharding.RULES[used.index(False)]


def test_an_unknown_or_ambiguous_parameter_is_an_error(monkeypatch):
  with pytest.raises(ValueError, match="'layers/mlp/router' matches 0 rules"):
    sharding.spec('layers/mlp/router')
  with pytest.raises(ValueError, match='matches 0 rules'):
    sharding.param_shardings({'my_embedding': jnp.ones((2, 2))}, sharding.make_mesh())
  monkeypatch.setattr(sharding, 'RULES', (*sharding.RULES, (r'lm_.*', P())))
  with pytest.raises(ValueError, match='matches 2 rules'):
    sharding.spec('lm_head')


def test_what_an_axis_does_not_divide_is_replicated_along_it():
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  where = sharding.param_shardings(shapes(PRESETS['smollm2-135m']), mesh)
  attention = where['layers']['attention']
  assert attention['q_proj'].spec == P(None, 'fsdp', None, None)  # 9 query heads on tensor=2
  assert attention['k_proj'].spec == P(None, 'fsdp', None, None)  # 3 key heads
  assert where['embedding'].spec == P('tensor', 'fsdp')


def test_optimizer_state_lies_where_its_parameters_lie():
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  params = shapes(tiny.config('llama'))
  state = jax.eval_shape(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, params
  )
  spread = sharding.param_shardings(state, mesh)
  wanted = sharding.param_shardings(params, mesh)
  moments = [
    s for s in jax.tree.leaves(spread, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(s, 'mu')
  ]
  assert moments[0].mu == moments[0].nu == wanted
  assert moments[0].count.spec == P()


@pytest.mark.parametrize(
  'kind, sizes', [('qwen3-untied', (1, 8, 1)), ('qwen3-tied', (2, 2, 2)), ('llama', (1, 2, 4))]
)
def test_the_mesh_does_not_change_loss_or_gradient(kind, sizes):
  model, params = tiny.model(kind)
  tokens, valid = tiny.batch([9, 5, 7, 9, 1, 2, 8, 9], 9)

  def loss(params, tokens, valid):
    hidden, _ = model.forward(params, tokens, valid)
    return jnp.mean(jnp.sin(hidden), where=valid[..., None])

  expected = jax.jit(jax.value_and_grad(loss))(params, tokens, valid)
  mesh = sharding.make_mesh(*sizes)
  where = sharding.param_shardings(params, mesh)
  step = jax.jit(
    jax.value_and_grad(loss),
    in_shardings=(where, sharding.rows(mesh), sharding.rows(mesh)),
    out_shardings=(sharding.replicated(mesh), where),
  )
  with jax.set_mesh(mesh):
    got = step(jax.device_put(params, where), tokens, valid)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


def test_activations_stay_split_by_rows():
  """Without the constraint XLA would rather split the width, as the embedding table is."""
  model, params = tiny.model()
  mesh = sharding.make_mesh(data=2, fsdp=4)
  where = sharding.param_shardings(params, mesh)
  tokens, valid = tiny.batch([9] * 8, 9)
  with jax.set_mesh(mesh):
    rows = sharding.rows(mesh)
    forward = jax.jit(lambda p, t, v: model.forward(p, t, v)[0], in_shardings=(where, rows, rows))
    hidden = forward(params, tokens, valid)
  assert hidden.sharding.spec[0] == ('data', 'fsdp')


def test_fewer_rows_than_devices():
  model, params = tiny.model()
  mesh = sharding.make_mesh(data=2, fsdp=4)
  tokens, valid = tiny.batch([9, 5, 4], 9)
  expected = tiny.logits(model, params, tokens, valid)
  with jax.set_mesh(mesh):
    spread = jax.device_put(params, sharding.param_shardings(params, mesh))
    got = tiny.logits(model, spread, tokens, valid)
  np.testing.assert_allclose(got[valid], expected[valid], atol=1e-4)
