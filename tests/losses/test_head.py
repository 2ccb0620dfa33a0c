"""The fused head against autodiff of the dense definition, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dopd_jax.losses import rules
from dopd_jax.losses.head import Grads, Part, Rows, Setting, head_grads, head_loss, head_signals
from dopd_jax.losses.rules import Rule

N, D, V, LIVE, BANNED = 23, 6, 20, 17, (3, 11)
T = 1.3

RULES = {
  'js': Rule('a', 'js'),
  'generalised js': Rule('a', 'generalised_js', mixture=0.3),
  'generalised js 0': Rule('a', 'generalised_js', mixture=0.0),
  'generalised js 1': Rule('a', 'generalised_js', mixture=1.0),
  'forward kl': Rule('a', 'forward_kl'),
  'clipped forward kl': Rule('a', 'forward_kl', term_clip=0.05),
  'reverse kl': Rule('a', 'reverse_kl'),
  **{
    f'{divergence} on 4 of {whose}, {tail}': Rule(
      'a', divergence, 'top_k', k=4, tail=tail, support=whose
    )
    for divergence in ('forward_kl', 'reverse_kl', 'js')
    for tail in ('bucket', 'renormalise', 'truncate')
    for whose in ('student', 'source')
  },
  'k = 1': Rule('a', 'reverse_kl', 'top_k', k=1),
  'k beyond V': Rule('a', 'reverse_kl', 'top_k', k=LIVE, tail='truncate'),
  **{f'sampled {d}': Rule('a', d, 'sampled', clip=5.0) for d in ('forward_kl', 'reverse_kl', 'js')},
  'cross entropy': Rule('', 'cross_entropy'),
  'policy gradient': Rule('', 'policy_gradient', clip_low=0.2, clip_high=0.3),
  'capped ratio': Rule('a', 'js', ratio_cap=1.2),
}
SHAPES = {
  'one tile': {},
  'tiles of 5': {'tile': 5},
  'tiles of 1': {'tile': 1},
  'streamed': {'tile': 6, 'columns': 7},
  'streamed by one less': {'columns': V - 1},
}


@functools.cache
def data(seed=0):
  """Hidden states, head, sources (b is the sum of a part for all rows and one for some), rows."""
  keys = iter(jax.random.split(jax.random.key(seed), 20))
  normal = lambda *shape: 0.7 * jax.random.normal(next(keys), shape)
  live = jax.random.bernoulli(next(keys), 0.8, (N,))
  sources = {
    'a': (Part(normal(N, 5), normal(V, 5)),),
    'b': (
      Part(normal(N, 7), normal(V, 7), 0.6),
      Part(normal(N, 3), normal(V, 3), 1.5, jax.random.bernoulli(next(keys), 0.5, (N,))),
    ),
  }
  rows = Rows(
    jax.random.choice(next(keys), jnp.array([i for i in range(LIVE) if i not in BANNED]), (N,)),
    live,
    jax.random.randint(next(keys), (N,), -1, 3),
    jax.random.uniform(next(keys), (N,)),
    normal(N),
    -3 * jax.random.uniform(next(keys), (N,)),
  )
  return 2 * normal(N, D), normal(V, D), sources, rows


def dense(table, hidden, head, sources, rows):
  """The definition: whole logits, `rules.token_loss`, autodiff."""

  def logits(parts):
    found = 0
    for part in parts:
      z = part.weight * part.hidden @ part.head.T
      found += z if part.rows is None else jnp.where(part.rows[:, None], z, 0)
    return jnp.where(np.isin(np.arange(LIVE), BANNED), -1e9, found[:, :LIVE])

  regime = jnp.where(rows.live, rows.regime, -1)
  student, views = logits((Part(hidden, head),)), {n: logits(p) for n, p in sources.items()}
  more = rows.advantage, rows.old_logp
  loss = rules.token_loss(table, student, views, rows.tokens, regime, T, *more)
  return jnp.sum(jnp.where(rows.live, rows.coef, 0) * loss), loss


def setting(table, **shape):
  return Setting(table, T, LIVE, BANNED, **shape)


def check(table, shape, given=None, atol=1e-5):
  hidden, head, sources, rows = given or data()
  both = lambda fn: jax.value_and_grad(fn, (0, 1), has_aux=True)(hidden, head)
  (want, want_each), want_grads = both(lambda h, w: dense(table, h, w, sources, rows))
  fn = lambda h, w: head_loss(setting(table, **shape), h, w, sources, rows)
  (got, seen), grads = jax.jit(both, static_argnums=0)(fn)
  for a, b in ((got, want), (seen.loss, want_each), *zip(grads, want_grads)):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)
  return seen, grads


def table_of(rule):
  return (rule,), (rule._replace(weight=0.3),), ()


MIXED = (
  (RULES['js'],),
  (RULES['reverse_kl on 4 of student, bucket']._replace(source='b'), Rule('', 'cross_entropy')),
  (RULES['reverse kl']._replace(source='b'), RULES['js']._replace(weight=0.5)),
)


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('table', [*map(table_of, RULES.values()), MIXED], ids=[*RULES, 'mixed'])
def test_every_rule_is_its_definition(table, shape):
  """Loss, dH and dW; a third of the regimes have no rule, a fifth of the rows is not live."""
  seen, (d_hidden, _) = check(table, shape)
  assert (np.abs(d_hidden).max(1) > 0).sum() >= 5
  rows = data()[3]
  assert not np.asarray(seen.logp)[~rows.live].any()


def test_what_is_seen_of_the_student():
  hidden, head, _, rows = data()
  seen, _ = check(MIXED, {'tile': 4})
  z = (hidden @ head.T)[:, :LIVE] / T
  z = jnp.where(np.isin(np.arange(LIVE), BANNED), -jnp.inf, z)
  logp = jax.nn.log_softmax(z)
  at = jnp.take_along_axis(logp, rows.tokens[:, None], 1)[:, 0]
  entropy = -jnp.sum(jnp.where(jnp.isfinite(logp), jnp.exp(logp) * logp, 0), 1)
  np.testing.assert_allclose(seen.logp, jnp.where(rows.live, at, 0), atol=1e-5)
  np.testing.assert_allclose(seen.entropy, jnp.where(rows.live, entropy, 0), atol=1e-5)
  found = head_signals(setting((), tile=5), hidden, head, rows.tokens, rows.live)
  lse = jax.nn.logsumexp(z, axis=1)
  for a, b in zip(found, (at, lse, entropy)):
    np.testing.assert_allclose(a, jnp.where(rows.live, b, 0), atol=1e-5)


@pytest.mark.parametrize('table', [table_of(RULES['js']), MIXED], ids=['js', 'mixed'])
def test_dead_rows_may_hold_anything(table):
  hidden, head, sources, rows = data()
  bad = lambda x: jnp.where(rows.live.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.nan)
  dirty = {n: tuple(p._replace(hidden=bad(p.hidden)) for p in ps) for n, ps in sources.items()}
  more = rows._replace(coef=bad(rows.coef), old_logp=bad(rows.old_logp))
  clean = head_grads(setting(table, tile=4), hidden, head, sources, rows)
  again = head_grads(setting(table, tile=4), bad(hidden), head, dirty, more)
  jax.tree.map(np.testing.assert_array_equal, clean, again)


def test_no_live_row_at_all():
  hidden, head, sources, rows = data()
  nothing = rows._replace(live=jnp.zeros(N, bool))
  found = head_grads(setting(MIXED, tile=4), hidden, head, sources, nothing)
  assert not any(map(np.any, jax.tree.leaves(found)))


def test_the_order_of_rows_changes_nothing():
  hidden, head, sources, rows = data()
  order = np.random.default_rng(0).permutation(N)
  turn = lambda tree: jax.tree.map(lambda x: x[order] if np.shape(x)[:1] == (N,) else x, tree)
  loss, seen, grads = head_grads(setting(MIXED, tile=4), hidden, head, sources, rows)
  found = head_grads(setting(MIXED, tile=4), turn(hidden), head, turn(sources), turn(rows))
  want = loss, *turn(seen), turn(grads.hidden), grads.head
  for a, b in zip((found[0], *found[1], *found[2]), want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('columns', [0, 3])
@pytest.mark.parametrize('whose', ['student', 'source'])
def test_ties_go_to_the_smaller_id(whose, columns):
  """Half of the columns have the same logit; K cuts through them."""
  hidden, head, sources, rows = data()
  same = lambda w: w.at[1::2].set(w[1])
  tied = {'a': (sources['a'][0]._replace(head=same(sources['a'][0].head)),)}
  rule = Rule('a', 'reverse_kl', 'top_k', k=5, support=whose)
  check(table_of(rule), {'columns': columns}, (hidden, same(head), tied, rows))


def test_a_gradient_that_flows_on_is_scaled_and_one_that_is_given_is_added_to():
  hidden, head, sources, rows = data()
  fn = lambda h, w: head_loss(setting(MIXED), h, w, sources, rows)[0]
  one = jax.grad(fn, (0, 1))(hidden, head)
  three = jax.grad(lambda h, w: 3 * fn(h, w), (0, 1))(hidden, head)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), one, three)
  before = jnp.ones((V, D))
  _, _, grads = head_grads(setting(MIXED, tile=4), hidden, head, sources, rows, before)
  np.testing.assert_allclose(grads.head, 1 + one[1], atol=1e-5)


def test_one_hot_and_equal_distributions():
  """A source that is certain, and one that is the student: finite, and exactly nothing."""
  hidden, head, _, rows = data()
  certain = {'a': (Part(hidden, 300 * head),)}
  for rule in (RULES['js'], RULES['forward kl'], RULES['js on 4 of student, bucket']):
    check(table_of(rule), {}, (hidden, head, certain, rows), atol=1e-4)
  for name in ('js', 'reverse kl', 'forward kl', 'reverse_kl on 4 of student, bucket'):
    own = {'a': (Part(hidden, head),)}
    loss, _, grads = head_grads(setting(table_of(RULES[name])), hidden, head, own, rows)
    assert abs(loss) < 1e-6 and max(np.abs(x).max() for x in grads) < 1e-6


@pytest.mark.parametrize('shards', [2, 4])
@pytest.mark.parametrize('name', ['mixed', 'js', 'js on 4 of source, renormalise', 'capped ratio'])
@pytest.mark.parametrize('columns', [0, 2])
def test_columns_split_over_devices(name, shards, columns):
  hidden, head, sources, rows = data()
  table = MIXED if name == 'mixed' else table_of(RULES[name])
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((shards,), ('tensor',), auto, devices=jax.devices()[:shards])
  split, whole = P('tensor'), P()
  of = lambda p: Part(whole, split, whole, None if p.rows is None else whole)
  specs = {n: tuple(map(of, parts)) for n, parts in sources.items()}
  run = jax.shard_map(
    lambda *x: head_grads(setting(table, tile=5, columns=columns, axis='tensor'), *x),
    mesh=mesh,
    in_specs=(whole, split, specs, whole),
    out_specs=(whole, whole, Grads(whole, split)),
    check_vma=False,
  )
  loss, seen, (d_hidden, d_head) = jax.jit(run)(hidden, head, sources, rows)
  want = head_grads(setting(table), hidden, head, sources, rows)
  for a, b in zip((loss, *seen, d_hidden, d_head), (want[0], *want[1], *want[2])):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_keeps_logits_in_float32():
  """As the float32 head on the same rounded inputs, but for the rounding of dz: 2^-9 of each."""
  hidden, head, sources, rows = data()
  low = lambda x: x.astype(jnp.bfloat16)
  high = lambda x: low(x).astype(jnp.float32)
  cast = lambda to: {
    n: tuple(p._replace(hidden=to(p.hidden), head=to(p.head)) for p in ps)
    for n, ps in sources.items()
  }
  args = low(hidden), low(head), cast(low), rows
  # A CPU may keep more digits than a program asks for, so the program itself is read.
  program = str(jax.make_jaxpr(lambda *x: head_grads(setting(MIXED, tile=5), *x))(*args))
  matmuls = program.count('dot_general[')
  assert matmuls >= 5 and program.count('preferred_element_type=float32') == matmuls
  got = head_grads(setting(MIXED, tile=5), *args)
  want = head_grads(setting(MIXED, tile=5), high(hidden), high(head), cast(high), rows)
  np.testing.assert_allclose(got[1].loss, want[1].loss, atol=1e-5, rtol=1e-5)
  assert got[2].hidden.dtype == jnp.bfloat16 and got[2].head.dtype == jnp.float32
  for a, b in zip(got[2], want[2]):
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-7 * np.abs(b).max())
