"""score and update against the dense library form, and the invariances that must hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopd_jax import losses, models, objectives, sharding, state, step

LIVE = 29  # len(tokenizer); the student's table has 32 rows, the teacher's 40


def config(vocab, width, layers):
  return models.DecoderConfig(
    vocab_size=vocab,
    hidden_size=width,
    intermediate_size=2 * width,
    num_hidden_layers=layers,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
  )


@functools.cache
def pair():
  student = models.build(config(32, 16, 2))
  teacher = models.build(config(40, 24, 3))
  return student, student.init(jax.random.key(0)), teacher, teacher.init(jax.random.key(1))


def make_batch(B=8, N=7, seed=0, hint=True, privileged_pad=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, 6, B)
  plain = rng.integers(1, LIVE, (B, 6))
  extra = rng.integers(1, LIVE, (B, 4))
  contexts = {'plain': [plain[b, : lengths[b]] for b in range(B)]}
  contexts['privileged'] = [
    np.concatenate([row, extra[b, : 1 + b % 4]]) if hint else row
    for b, row in enumerate(contexts['plain'])
  ]
  prompts = {}
  for name, rows in contexts.items():
    P = max(map(len, rows)) + privileged_pad
    ids = np.zeros((B, P), np.int32)
    for b, row in enumerate(rows):
      ids[b, : len(row)] = row
    prompts[name] = step.Prompt(jnp.asarray(ids), jnp.array([len(r) for r in rows], jnp.int32))
  completion = rng.integers(1, LIVE, (B, N)).astype(np.int32)
  mask = np.arange(N)[None] < np.array([7, 4, 0, 1, 6, 7, 2, 5])[:B, None]
  mask = jnp.asarray(mask)
  return step.Batch(prompts, jnp.asarray(completion), mask, mask, jnp.zeros((B, N)))


@functools.cache
def base():
  return run()


def run(settings=None, batch=None, microbatch=8, head_tile=128, mesh=None, tx=None, params=None):
  student, student_params, teacher, teacher_params = pair()
  objective = (settings or objectives.Dopd(k=5)).build()
  tx = tx or optax.sgd(1.0)
  batch = batch or make_batch()
  now = state.create(student_params if params is None else params, tx, objective)
  if mesh:
    now = jax.device_put(now, sharding.param_shardings(now, mesh))
    teacher_params = jax.device_put(teacher_params, sharding.param_shardings(teacher_params, mesh))
    batch = jax.device_put(batch, sharding.rows(mesh))
  models, given = {'teacher': {'': teacher}}, {'teacher': {'': teacher_params}}
  steps = step.make_steps(
    student, models, objective, tx, live_vocab=LIVE, microbatch=microbatch, head_tile=head_tile
  )
  scored = jax.jit(steps.score)(now, given, batch)
  new, updated = jax.jit(steps.update)(now, given, batch, scored)
  return now, new, scored, updated, steps


def dense_logits(model, params, prompt, batch):
  """Packed by hand, one row after the other: rows prompt_len - 1 + j of its own prompt."""
  B, N = batch.tokens.shape
  ids = np.zeros((B, prompt.tokens.shape[1] + N), np.int32)
  lengths = [(int(p), int(m.sum())) for p, m in zip(prompt.length, batch.mask)]
  for b, (p, n) in enumerate(lengths):
    ids[b, : p + n] = np.concatenate([prompt.tokens[b, :p], batch.tokens[b, :n]])
  valid = np.arange(ids.shape[1])[None] < np.array([p + n for p, n in lengths])[:, None]
  hidden, _ = jax.jit(model.forward)(params, ids, valid)
  logits = np.asarray(hidden @ model.head(params).T)[..., :LIVE]
  out = np.zeros((B, N, LIVE), np.float32)
  for b, (p, n) in enumerate(lengths):
    out[b, :n] = logits[b, p - 1 : p - 1 + n]
  return jnp.asarray(out)


def test_score_and_update_equal_the_dense_library_form():
  student, params, teacher, teacher_params = pair()
  batch = make_batch()
  _, new, scored, updated, _ = base()
  S = dense_logits(student, params, batch.prompts['plain'], batch)
  Sp = dense_logits(student, params, batch.prompts['privileged'], batch)
  Tp = dense_logits(teacher, teacher_params, batch.prompts['privileged'], batch)
  want, aux = losses.dopd_loss(S, Sp, Tp, batch.tokens, batch.mask, k=5)
  assert set(np.unique(aux.routing.regime)) == {-1, 0, 1, 2, 3}
  np.testing.assert_array_equal(scored.plan.regime, aux.routing.regime)
  for name in ('gap_threshold', 'confidence_threshold'):
    np.testing.assert_allclose(scored.plan.scalars[name], getattr(aux.routing, name), rtol=1e-5)
  np.testing.assert_allclose(updated.token.loss, aux.token_loss, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(updated.loss, want, rtol=1e-5)

  ids, valid = losses.pack(*batch.prompts['plain'][:2], batch.tokens, batch.mask)

  def loss(p):
    hidden, _ = student.forward(p, ids, valid)
    rows = losses.completion_rows(hidden, batch.prompts['plain'].length, 7)
    logits = (rows @ student.head(p).T)[..., :LIVE]
    return losses.dopd_loss(logits, Sp, Tp, batch.tokens, batch.mask, k=5)[0]

  grads = jax.jit(jax.grad(loss))(params)
  np.testing.assert_allclose(updated.grad_norm, optax.tree.norm(grads), rtol=1e-5)
  jax.tree.map(
    lambda p, g, got: np.testing.assert_allclose(got, p - g, atol=1e-5), params, grads, new.params
  )


def test_signals_are_those_of_each_view():
  student, params, teacher, teacher_params = pair()
  batch, (_, _, scored, updated, _) = make_batch(), base()
  for name, model, weights, context in (
    ('Sp', student, params, 'privileged'),
    ('Tp', teacher, teacher_params, 'privileged'),
  ):
    logits = dense_logits(model, weights, batch.prompts[context], batch)
    logp = jax.nn.log_softmax(logits)
    want = jnp.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]
    m = np.asarray(batch.mask)
    np.testing.assert_allclose(scored.signals[name].logp_y[m], want[m], atol=1e-5)
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    np.testing.assert_allclose(scored.signals[name].entropy[m], entropy[m], atol=1e-5)
  S = dense_logits(student, params, batch.prompts['plain'], batch)
  want = jnp.take_along_axis(jax.nn.log_softmax(S), batch.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(updated.token.logp[m], want[m], atol=1e-5)


VARIANTS = {
  'micro-batches of 2': dict(microbatch=2),
  'tiles of 3': dict(head_tile=3),
  'padding': dict(batch=make_batch(privileged_pad=5)),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_invariance(name):
  """How a batch is cut changes neither signals nor the update (law 3; meshes: test_meshes.py)."""
  _, new, scored, updated, _ = run(**VARIANTS[name])
  _, base_new, base_scored, base_updated, _ = base()
  np.testing.assert_array_equal(scored.plan.regime, base_scored.plan.regime)
  for key, value in base_scored.plan.scalars.items():
    np.testing.assert_allclose(scored.plan.scalars[key], value, rtol=1e-5)
  np.testing.assert_allclose(updated.loss, base_updated.loss, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new.params, base_new.params
  )


def test_identity():
  """Without a hint Sp is S: the self-regularised regimes give nothing; and T = S gives nothing."""
  student, params, *_ = pair()
  _, _, scored, updated, _ = run(batch=make_batch(hint=False))
  own = np.isin(scored.plan.regime, (1, 3))
  assert own.any()
  np.testing.assert_allclose(updated.token.loss[own], 0, atol=1e-6)
  np.testing.assert_allclose(updated.head_grad[own], 0, atol=1e-6)
  same = objectives.Dopd(k=5).build()
  models, given = {'teacher': {'': student}}, {'teacher': {'': params}}
  steps = step.make_steps(
    student, models, same, optax.sgd(1.0), live_vocab=LIVE, microbatch=8, head_tile=8
  )
  now, batch = state.create(params, optax.sgd(1.0), same), make_batch(hint=False)
  _, updated = jax.jit(steps.update)(now, given, batch, jax.jit(steps.score)(now, given, batch))
  assert abs(updated.loss) < 1e-6 and updated.grad_norm < 1e-6


def test_ids_beyond_the_tokenizer_have_probability_zero():
  """Raising the logits of the padded rows of either table changes nothing."""
  params = pair()[1]
  loud = params | {'embedding': params['embedding'].at[LIVE:].set(50.0)}
  _, _, _, updated, _ = run(params=loud)
  np.testing.assert_allclose(updated.loss, base()[3].loss, rtol=1e-6)


def test_nonfinite_gradients_never_reach_the_state():
  batch = make_batch()
  batch = batch._replace(
    tokens=jnp.where(batch.tokens == 3, 4, batch.tokens),
    prompts={
      k: step.Prompt(jnp.where(p.tokens == 3, 4, p.tokens), p.length)
      for k, p in batch.prompts.items()
    },
  )
  first = batch.prompts['plain'].tokens.at[5, 0].set(3)  # one row reads the broken embedding
  batch.prompts['plain'] = batch.prompts['plain']._replace(tokens=first)
  # An untied reading: the head must stay finite, or every row is broken at once.
  untied = models.build(
    models.DecoderConfig(**{**vars(config(32, 16, 2)), 'tie_word_embeddings': False})
  )
  weights = untied.init(jax.random.key(0))
  weights['embedding'] = weights['embedding'].at[3].set(jnp.nan)
  objective, tx = objectives.Dopd(k=5).build(), optax.adam(1e-2)
  _, _, teacher, teacher_params = pair()
  given = {'teacher': {'': teacher_params}}
  steps = step.make_steps(
    untied, {'teacher': {'': teacher}}, objective, tx, live_vocab=LIVE, microbatch=4, head_tile=8
  )
  now = state.create(weights, tx, objective)
  scored = jax.jit(steps.score)(now, given, batch)
  new, updated = jax.jit(steps.update)(now, given, batch, scored)
  assert not updated.ok
  assert updated.row_finite.tolist() == [b != 5 for b in range(8)]
  jax.tree.map(np.testing.assert_array_equal, new, now)


@pytest.mark.parametrize('method', ['dopd', 'dopd_signed', 'hint_routing', 'opd'])
def test_a_policy_that_says_nan_is_not_routed_around(method):
  """Every comparison with NaN is false: all tokens could go to the other policies, all finite."""
  student, params, teacher, teacher_params = pair()
  norm = jax.tree.map(lambda x: x * jnp.nan, teacher_params['final_norm'])
  broken, batch = teacher_params | {'final_norm': norm}, make_batch()
  objective, tx = objectives.METHODS[method]().build(), optax.adam(1e-2)
  steps = step.make_steps(
    student, {'teacher': {'': teacher}}, objective, tx, live_vocab=LIVE, microbatch=4, head_tile=8
  )
  now, given = state.create(params, tx, objective), {'teacher': {'': broken}}
  scored = jax.jit(steps.score)(now, given, batch)
  new, updated = jax.jit(steps.update)(now, given, batch, scored)
  assert not updated.ok
  np.testing.assert_array_equal(updated.row_finite, ~batch.mask.any(axis=1))
  jax.tree.map(np.testing.assert_array_equal, new, now)


def test_a_batch_without_tokens_changes_only_the_count():
  batch = make_batch()
  batch = batch._replace(supervised=batch.mask & False)
  now, new, _, updated, _ = run(batch=batch, tx=optax.adamw(1e-2, weight_decay=0.1))
  assert updated.ok and updated.loss == 0 and updated.grad_norm == 0
  assert new.step == 1
  jax.tree.map(np.testing.assert_array_equal, new.params, now.params)
  jax.tree.map(np.testing.assert_array_equal, new.opt_state, now.opt_state)


def test_measure_says_what_update_says():
  now, _, scored, updated, steps = base()
  given = {'teacher': {'': pair()[3]}}
  token = jax.jit(steps.measure)(now, given, make_batch(), scored)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), token, updated.token)


@pytest.mark.parametrize('reference', ['ema', 'frozen'])
def test_self_reference(reference):
  """Frozen: the anchor is the student as given. EMA: a running mean that follows at its rate."""
  settings = objectives.Dopd(k=5, self_reference=reference, ema_rate=0.25)
  now, new, _, _, _ = run(settings)
  kept = getattr(new, reference)
  want = (
    now.params
    if reference == 'frozen'
    else jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, new.params, now.params)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, want)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.params, now.params)
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_sft_is_cross_entropy_on_the_data():
  student, params, *_ = pair()
  batch = make_batch()
  objective, tx = objectives.Sft().build(), optax.sgd(0.1)
  steps = step.make_steps(student, {}, objective, tx, live_vocab=LIVE, microbatch=4, head_tile=4)
  now = state.create(params, tx, objective)
  _, updated = jax.jit(steps.update)(now, {}, batch, jax.jit(steps.score)(now, {}, batch))
  S = dense_logits(student, params, batch.prompts['plain'], batch)
  logp = jnp.take_along_axis(jax.nn.log_softmax(S), batch.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(updated.loss, -logp[batch.mask].mean(), rtol=1e-5)


def test_warm_up_reaches_the_full_rate_when_it_says():
  from dopd_jax.config import Optimizer

  rate = state.learning_rate(Optimizer(learning_rate=2.0, warmup_steps=50), 500)
  assert rate(50) == 2.0 and rate(25) == 1.0 and abs(rate(500)) < 1e-6
  assert state.learning_rate(Optimizer(learning_rate=2.0), 10)(0) == 2.0
