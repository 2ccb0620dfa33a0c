"""Every method through `score` and `update` equals its dense form on the models' own logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopd_jax import losses, models, objectives, state, step
from tests import test_step

SAMPLES = 4
REWARD = jnp.array([1, 0, 1, 0, 0, 0, 1, 1.0])
METHODS = {name: settings for name, settings in objectives.METHODS.items() if name != 'sft'}


def settings_of(name, **changes):
  fields = {f.name for f in dataclasses.fields(METHODS[name])}
  small = {'k': 5, 'threshold': 2.0, 'share': 0.4}
  changes = {key: value for key, value in small.items() if key in fields} | changes
  return METHODS[name](**changes)


@functools.cache
def batch():
  """Each rendering that any view names; the stand-ins for images are other prompts."""
  base = test_step.make_batch()
  other = test_step.make_batch(seed=3)
  prompts = dict(base.prompts)
  prompts['sibling'] = other.prompts['privileged']
  prompts['plain+crop'] = other.prompts['plain']
  prompts['plain+degraded'] = test_step.make_batch(seed=4).prompts['plain']
  logp = base.logp - 2.0
  return base._replace(prompts=prompts, logp=logp, reward=REWARD)


@functools.cache
def worlds():
  """The models, and a student that has moved away from its frozen and averaged copies."""
  student, params, teacher, teacher_params = test_step.pair()
  reference = models.build(test_step.config(32, 16, 2))
  given = {
    'teacher': {'': teacher_params},
    'reference': {'': reference.init(jax.random.key(2))},
  }
  moved = jax.tree.map(lambda x: x * 1.05, params)
  return student, params, moved, {'teacher': {'': teacher}, 'reference': {'': reference}}, given


def start(objective, tx):
  _, params, moved, _, _ = worlds()
  return state.create(params, tx, objective)._replace(params=moved)


def run(settings, tx=None):
  student, _, _, built, given = worlds()
  objective, tx = settings.build(), tx or optax.sgd(1.0)
  steps = step.make_steps(
    student,
    built,
    objective,
    tx,
    live_vocab=test_step.LIVE,
    microbatch=4,
    head_tile=3,
    samples=SAMPLES,
    seed=5,
  )
  now = start(objective, tx)
  scored = jax.jit(steps.score)(now, given, batch())
  new, updated = jax.jit(steps.update)(now, given, batch(), scored)
  return objective, now, new, scored, updated


def logits_of_views(objective, now):
  """By the forward of each model on rows packed by hand."""
  student, _, _, built, given = worlds()
  own = {'student': now.params, 'ema': now.ema, 'frozen': now.frozen}
  found = {}
  for name, view in objective.views.items():
    model = student if view.weights in own else built[view.weights]['']
    params = own[view.weights] if view.weights in own else given[view.weights]['']
    found[name] = test_step.dense_logits(model, params, batch().prompts[view.prompt], batch())
  return found


def dense(objective, now):
  """The dense form, the student's logits made by its own forward."""
  prompt = batch().prompts[objective.student.prompt]
  student_logits = test_step.dense_logits(worlds()[0], now.params, prompt, batch())
  return objectives.objective_loss(
    objective,
    student_logits,
    logits_of_views(objective, now),
    batch().tokens,
    batch().mask,
    logp=batch().logp,
    reward=REWARD,
    samples=SAMPLES,
    key=jax.random.fold_in(jax.random.key(5), now.step),
  )


@pytest.mark.parametrize('name', [*METHODS, 'exopd, reference', 'exopd, full', 'eopd, once'])
def test_update_is_the_dense_form(name):
  changes = {
    'exopd, reference': {'reference': 'reference', 'old_logp': 'student'},
    'exopd, full': {'form': 'full'},
  }.get(name, {})
  settings = settings_of(name.split(',')[0], updates=1, **changes)
  objective, now, _, scored, updated = run(settings)
  want, aux = dense(objective, now)
  assert updated.ok and updated.grad_norm > 1e-4
  np.testing.assert_array_equal(scored.plan.regime, aux.plan.regime)
  np.testing.assert_allclose(scored.plan.coef, aux.plan.coef, atol=1e-6)
  carries = np.asarray(aux.plan.coef != 0)
  np.testing.assert_allclose(
    np.asarray(updated.token.loss)[carries],
    np.asarray(aux.token_loss)[carries],
    rtol=2e-4,
    atol=1e-5,
  )
  np.testing.assert_allclose(updated.loss, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_every_method_moves_the_student_elsewhere():
  """Two SGD updates of each from the same state: finite, and no two the same."""
  moves = {}
  for name in METHODS:
    # Over the whole batch one threshold and two happen to part these few tokens alike.
    changes = {'scope': 'sequence'} if name in ('dopd', 'dopd_signed') else {}
    *_, new, _, updated = run(settings_of(name, **changes), optax.sgd(0.1))
    assert updated.ok, name
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(new.params)])
    assert np.isfinite(flat).all()
    moves[name] = flat
  names = sorted(moves)
  for i, a in enumerate(names):
    for b in names[i + 1 :]:
      assert np.abs(moves[a] - moves[b]).max() > 1e-6, f'{a} is {b}'


@pytest.mark.parametrize('name', ['eopd', 'dopd', 'sdft'])
def test_several_updates_share_one_plan(name):
  """Row r is in update r mod n; all updates use the plan and the sources of the first moment."""
  changes = {'sdft': {'teacher': 'ema', 'ema_rate': 0.5}}.get(name, {})
  rate, n = 0.3, 2
  objective, now, new, *_ = run(settings_of(name, updates=n, **changes), optax.sgd(rate))
  student, *_ = worlds()
  views = logits_of_views(objective, now)
  _, aux = dense(objective, now)
  prompt, tokens, mask = batch().prompts['plain'], batch().tokens, batch().mask

  def loss(params, rows):
    ids, valid = losses.pack(prompt.tokens[rows], prompt.length[rows], tokens[rows], mask[rows])
    hidden, _ = student.forward(params, ids, valid)
    hidden = losses.completion_rows(hidden, prompt.length[rows], tokens.shape[1])
    logits = (hidden @ student.head(params).T)[..., : test_step.LIVE]
    plan = jax.tree.map(lambda x: x[rows] if x.ndim else x, aux.plan)
    each = losses.batched_token_loss(
      objective.rules,
      logits,
      {k: v[rows] for k, v in views.items()},
      tokens[rows],
      plan.regime,
      1.0,
      plan.advantage,
      plan.old_logp,
    )
    return n * jnp.sum(plan.coef * each)

  params, ema = now.params, now.ema
  for part in range(n):
    rows = np.arange(part, 8, n)
    grads = jax.jit(jax.grad(loss))(params, rows)
    params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    if ema is not None:
      ema = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * p, ema, params)
  assert new.step == now.step + 1
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5)
  jax.tree.map(close, new.params, params)
  if ema is not None:
    jax.tree.map(close, new.ema, ema)
