"""Every row of the paper's ablation tables is a config, and each row is another method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopd_jax import losses, objectives, state, step
from dopd_jax.objectives.dopd import Cell
from tests import test_step


def uniform(source='teacher', divergence='js', region='top_k', strength='strong'):
  return Cell(source, divergence, region, strength)


def only(regimes, adaptive):
  """Table 6: the ticked token types alone carry loss; non-adaptive ones all carry the same."""
  cells = {}
  for name in ('LH', 'LL', 'HT', 'HS'):
    default = getattr(objectives.Dopd(), name)
    if name not in regimes:
      cells[name] = Cell(default.source, default.divergence, default.region, 'none')
    elif not adaptive:
      cells[name] = uniform()
  return objectives.Dopd(k=5, **cells)


def each(**changes):
  """Table 8: the same change in every regime."""
  cells = {
    name: Cell(**{**vars(getattr(objectives.Dopd(), name)), **changes})
    for name in ('LH', 'LL', 'HT', 'HS')
  }
  return objectives.Dopd(k=5, **cells)


def without(source):
  cells = {
    name: Cell(**{**vars(getattr(objectives.Dopd(), name)), 'strength': 'none'})
    for name in ('LH', 'LL', 'HT', 'HS')
    if getattr(objectives.Dopd(), name).source == source
  }
  return objectives.Dopd(k=5, **cells)


ROWS = {
  'table 6, HT': only(['HT'], adaptive=False),
  'table 6, HT+LH': only(['HT', 'LH'], adaptive=False),
  'table 6, HT+LL': only(['HT', 'LL'], adaptive=False),
  'table 6, HT+HS': only(['HT', 'HS'], adaptive=False),
  'table 6, all (table 8, w/o advantage-aware)': only(['LH', 'LL', 'HT', 'HS'], adaptive=False),
  'table 6, HT+LH, adaptive (table 8, w/o student distillation)': only(['HT', 'LH'], adaptive=True),
  'table 6, HT+LL, adaptive': only(['HT', 'LL'], adaptive=True),
  'table 6, HT+HS, adaptive': only(['HT', 'HS'], adaptive=True),
  **{
    f'table 7, {divergence} {region}': objectives.Opd(divergence=divergence, region=region, k=5)
    for divergence in ('forward_kl', 'reverse_kl', 'js')
    for region in ('sampled', 'top_k', 'full')
  },
  'table 8, w/o teacher distillation': without('teacher'),
  'table 8, w/o adaptive objectives': each(divergence='js'),
  'table 8, w/o adaptive strategies': each(region='top_k'),
  'table 8, full': objectives.Dopd(k=5),
  'fig 3, teacher only': objectives.Opd(k=5, teacher_context='privileged'),
  'fig 3, student only': objectives.Opd(k=5, student_context='privileged'),
  'fig 3, both': objectives.Opd(k=5, teacher_context='privileged', student_context='privileged'),
  'self reference, frozen, later': objectives.Dopd(k=5, self_reference='frozen'),
  'scope sequence': objectives.Dopd(k=5, scope='sequence'),
}


@functools.cache
def gradients():
  """One SGD step of every row from the same state: how far it moves each parameter."""
  student, params, teacher, teacher_params = test_step.pair()
  batch = test_step.make_batch()
  batches = dict.fromkeys(ROWS, batch)
  rows = dict(ROWS) | {'table 8, w/o privileged input': objectives.Dopd(k=5)}
  batches['table 8, w/o privileged input'] = test_step.make_batch(hint=False)
  # The student has moved on since the frozen copy was made, so that the copy differs from it.
  moved = jax.tree.map(lambda x: x * 1.05, params)
  models, given = {'teacher': {'': teacher}}, {'teacher': {'': teacher_params}}
  result = {}
  for name, settings in rows.items():
    objective, tx = settings.build(), optax.sgd(1.0)
    steps = step.make_steps(
      student, models, objective, tx, live_vocab=test_step.LIVE, microbatch=8, head_tile=8
    )
    now = state.create(params, tx, objective)._replace(params=moved)

    @jax.jit
    def run(now, batch, steps=steps):
      return steps.update(now, given, batch, steps.score(now, given, batch))

    new, updated = run(now, batches[name])
    assert updated.ok, name
    delta = jax.tree.map(lambda a, b: np.asarray(a - b).ravel(), new.params, now.params)
    result[name] = np.concatenate(jax.tree.leaves(delta))
  return result


@pytest.mark.slow
def test_each_row_differs_from_every_other():
  moves = gradients()
  names = sorted(moves)
  for i, a in enumerate(names):
    for b in names[i + 1 :]:
      distance = np.abs(moves[a] - moves[b]).max()
      assert distance > 1e-5, f'{a} is {b}'


def test_rows_that_are_one_method_in_both_tables():
  """The paper prints 47.9 for both, too."""
  assert without('self') == only(['HT', 'LH'], adaptive=True)


def test_dopd_objective_is_the_library_loss():
  """The objective's table equals the one that `dopd_loss` is made of."""
  built = objectives.Dopd().build()
  names = {'Sp': 'privileged_student', 'Tp': 'privileged_teacher'}
  ours = [tuple(r._replace(source=names[r.source]) for r in rules) for rules in built.rules]
  assert ours == list(losses.dopd_rules())
  assert built.regimes == ('LH', 'LL', 'HT', 'HS')


def test_views_of_each_method():
  S, Sp = objectives.View('student', 'plain'), objectives.View('student', 'privileged')
  T, Tp = objectives.View('teacher', 'plain'), objectives.View('teacher', 'privileged')
  dopd = objectives.Dopd().build()
  assert dopd.student == S and dict(dopd.views) == {'Sp': Sp, 'Tp': Tp}
  ema = objectives.Dopd(self_reference='ema').build()
  assert ema.views['Sr'] == objectives.View('ema', 'privileged')
  assert {r.source for rules in ema.rules for r in rules} == {'Tp', 'Sr'}
  assert dict(objectives.Opd().build().views) == {'T': T}
  assert objectives.Opd().build().contexts == {'plain'}
  assert objectives.Opd(student_context='privileged').build().student == Sp
  assert objectives.Sft().build().contexts == {'plain'}
  assert objectives.Sft(privileged_share=0.5).build().contexts == {'plain', 'privileged'}


def test_a_rule_must_name_a_view():
  with pytest.raises(ValueError, match='source'):
    objectives.Objective(
      name='x',
      student=objectives.View('student'),
      views={},
      regimes=('all',),
      rules=((losses.Rule('T', 'js'),),),
      router=objectives.grammar.one_regime,
    )


def test_plan_covers_exactly_the_mask():
  mask = jnp.asarray([[True, True, False], [False, False, False]])
  plan = objectives.make_plan(objectives.Opd().build(), objectives.Seen({}, mask))
  np.testing.assert_array_equal(plan.regime, [[0, 0, -1], [-1, -1, -1]])
  np.testing.assert_allclose(plan.coef, [[0.5, 0.5, 0], [0, 0, 0]])


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('signal', ['logp_y', 'entropy', 'pair'])
def test_a_signal_that_is_not_finite_takes_its_token_alone(signal, value):
  """The coefficient is NaN where a token carries loss, and stays 0 where it is masked."""
  mask = jnp.asarray([[True, True, False], [True, False, False]])
  bad = jnp.zeros(mask.shape).at[0, 1:].set(value)
  zeros = jnp.zeros(mask.shape)
  given = {name: bad if name == signal else zeros for name in ('logp_y', 'lse', 'entropy')}
  seen = objectives.Seen(
    {'T': objectives.grammar.Signals(**given)}, mask, {'pair': bad if signal == 'pair' else zeros}
  )
  plan = objectives.make_plan(objectives.Opd().build(), seen)
  np.testing.assert_allclose(plan.coef, [[0.25, np.nan, 0], [0.5, 0, 0]])
