"""Law 3 on meshes: whatever the devices and however they are arranged, the numbers are the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dopd_jax import heads, sharding
from dopd_jax.losses.head import Part, Rows, Setting
from dopd_jax.losses.rules import Rule
from tests import test_step

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


@functools.cache
def on_one_device():
  return test_step.run(microbatch=4, head_tile=3)


@pytest.mark.parametrize('sizes', MESHES)
def test_one_update_is_the_same_on_every_mesh(sizes):
  """DOPD's: signals, thresholds and gradients to 1e-5, regimes, parameters after a step of SGD."""
  mask = np.asarray(test_step.make_batch().mask)
  old, new, scored, updated, _ = on_one_device()
  mesh = sharding.make_mesh(*sizes)
  with jax.set_mesh(mesh):
    _, new_too, scored_too, updated_too, _ = test_step.run(microbatch=8, head_tile=3, mesh=mesh)
  # What is compared really was computed by all of them.
  assert len(new_too.params['embedding'].sharding.device_set) == 8

  for name, signals in scored.signals.items():
    for a, b in zip(scored_too.signals[name], signals):
      close(np.asarray(a)[mask], np.asarray(b)[mask])
  thresholds = scored.plan.scalars
  for name, value in thresholds.items():
    close(scored_too.plan.scalars[name], value)
  confidence = sum(np.exp(scored.signals[name].logp_y) for name in ('Sp', 'Tp'))
  sure = mask.copy()
  for name, value in (('gap', scored.plan.token['gap']), ('confidence', confidence)):
    sure &= np.abs(value - thresholds[f'{name}_threshold']) > 1e-4
  assert sure.sum() >= mask.sum() - 2
  np.testing.assert_array_equal(scored_too.plan.regime[sure], scored.plan.regime[sure])
  assert set(np.unique(scored.plan.regime)) == {-1, 0, 1, 2, 3}

  close(updated_too.loss, updated.loss)
  close(updated_too.grad_norm, updated.grad_norm)
  close(updated_too.head_grad, updated.head_grad)
  for a, b in zip(updated_too.token, updated.token):
    close(np.asarray(a)[mask], np.asarray(b)[mask])
  gradient = jax.tree.map(lambda a, b: a - b, old.params, new.params)  # SGD of rate 1
  assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3
  jax.tree.map(close, new_too.params, new.params)


B, N, V, LIVE = 8, 5, 24, 21
RULES = (
  (Rule('a', 'reverse_kl', 'top_k', k=4),),
  (Rule('b', 'js'), Rule('', 'cross_entropy', weight=0.5)),
)


def of_the_head():
  """Hidden states [B, N, D], the head [V, D], sources of other widths, rows."""
  keys = iter(jax.random.split(jax.random.key(0), 20))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  sources = {
    'a': (Part(normal(B, N, 4), normal(V, 4), jnp.float32(1.0)),),
    'b': (Part(normal(B, N, 8), normal(V, 8), jnp.float32(0.7), jnp.arange(B) % 3 > 0),),
  }
  rows = Rows(
    jax.random.randint(next(keys), (B, N), 0, LIVE),
    jax.random.bernoulli(next(keys), 0.8, (B, N)),
    jax.random.randint(next(keys), (B, N), 0, 2),
    jax.random.uniform(next(keys), (B, N)),
  )
  return normal(B, N, 8), normal(V, 8), sources, rows


def signals_and_grads(hidden, head, sources, rows):
  setting = Setting(RULES, 1.3, LIVE, (), 6)
  said = heads.signals(setting, hidden, head, rows.tokens, rows.live)
  start = heads.zeros(head, sources, rows.live)
  seen, d_hidden, d_head = heads.grads(setting, hidden, head, sources, rows, start)
  return said, seen, d_hidden, heads.total(d_head, head)


@pytest.mark.parametrize('sizes', MESHES)
@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_the_fused_head_on_every_mesh(kind, sizes):
  hidden, head, sources, rows = of_the_head()
  want = jax.jit(signals_and_grads)(hidden, head, sources, rows)
  mesh = jax.make_mesh(sizes, sharding.AXES, (kind,) * 3)
  by_rows = lambda x: jax.device_put(x, NamedSharding(mesh, sharding.ROWS if x.ndim else P()))
  table = lambda x: jax.device_put(x, NamedSharding(mesh, P('tensor', None)))
  part = lambda p: Part(by_rows(p.hidden), table(p.head), *jax.tree.map(by_rows, p[2:]))
  with jax.set_mesh(mesh):
    got = jax.jit(signals_and_grads)(
      by_rows(hidden),
      jax.device_put(head, NamedSharding(mesh, P('tensor', 'fsdp'))),  # as parameters lie
      {name: tuple(map(part, parts)) for name, parts in sources.items()},
      jax.tree.map(by_rows, rows),
    )
  assert len(got[2].sharding.device_set) == 8
  jax.tree.map(close, got, want)
