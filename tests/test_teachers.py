"""Several teachers: each record is judged by its own, one trunk on the device at a time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopd_jax import config as configs
from dopd_jax import (
  models,
  objectives,
  policies,
  report,
  sharding,
  state,
  step,
  teachers,
  train,
)
from dopd_jax.errors import UserError
from tests import pairs, test_step


def steps_of(given_models, objective, tx):
  student = test_step.pair()[0]
  return step.make_steps(
    student, given_models, objective, tx, live_vocab=test_step.LIVE, microbatch=4, head_tile=3
  )


@pytest.mark.parametrize('settings', [objectives.Dopd(k=5), objectives.Tip(share=0.4)])
def test_each_row_has_its_teachers_numbers(settings):
  """Widths and padded vocabularies differ; a teacher's rows are those of a run with it alone."""
  _, params, wide, wide_params = test_step.pair()
  narrow = models.build(test_step.config(32, 16, 1))
  narrow_params = narrow.init(jax.random.key(7))
  batch, tx, objective = test_step.make_batch(), optax.sgd(1.0), settings.build()
  names = ['math', 'code', 'math', 'math', 'code', 'math', 'code', 'math']
  records = [type('R', (), {'teacher': name})() for name in names]
  batch = batch._replace(teacher_rows=teachers.rows_by_teacher(records, ['code', 'math'], 4))
  assert {k: len(v) for k, v in batch.teacher_rows.items()} == {'code': 4, 'math': 8}
  now = state.create(params, tx, objective)

  loaded = {
    'code': policies.Loaded(narrow, teachers.park(narrow_params), None, {}),
    'math': policies.Loaded(wide, teachers.park(wide_params), None, {}),
  }
  given, resident = teachers.given({'teacher': loaded})
  both = steps_of({'teacher': {'code': narrow, 'math': wide}}, objective, tx)
  scored = both.score(now, given, batch, resident)  # the host gives turns: parts are jitted
  _, updated = jax.jit(both.update)(now, resident, batch, scored)
  hidden = scored.hidden.get('Tp', scored.hidden.get('T'))
  assert {h.shape[-1] for h in hidden.values()} == {16, 24}

  is_math = jnp.array([name == 'math' for name in names])[:, None]
  pick = lambda a, b: jax.tree.map(lambda x, y: jnp.where(is_math, x, y), a, b)
  alone = {}
  for name, model, weights in (('math', wide, wide_params), ('code', narrow, narrow_params)):
    one = steps_of({'teacher': {'': model}}, objective, tx)
    single = batch._replace(teacher_rows=None)
    alone[name] = one, jax.jit(one.score)(now, {'teacher': {'': weights}}, single), weights
  want = pick(alone['math'][1].signals, alone['code'][1].signals)
  m = np.asarray(batch.mask)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[m], b[m], atol=1e-5), scored.signals, want)
  # With the common plan, the loss of a token is that of a run with its teacher alone.
  losses = {}
  for name, (one, own, weights) in alone.items():
    own = own._replace(plan=scored.plan)
    given_one = {'teacher': {'': weights}}
    losses[name] = jax.jit(one.measure)(now, given_one, batch._replace(teacher_rows=None), own).loss
  np.testing.assert_allclose(updated.token.loss, pick(losses['math'], losses['code']), atol=1e-5)


def test_parked_parameters_are_in_host_memory():
  parked = teachers.park({'w': jnp.ones((4, 4))})
  assert parked['w'].sharding.memory_kind == 'pinned_host'
  assert teachers.Turns({'a': parked})['a']['w'].sharding.memory_kind == 'device'


@pytest.fixture
def two(tmp_path):
  """A run with two teachers of different width and the data that name them."""
  _, wide = pairs.pair()
  narrow = pairs.write(tmp_path / 'narrow', pairs.architecture(1, 16), 9)
  rows = [
    {'id': f'r{i}', 'prompt': f'a = {i % 7} ? a', 'privileged_context': 'a',
     'teacher': 'code' if i % 3 else 'math'}
    for i in range(24)
  ]  # fmt: skip
  path = tmp_path / 'data.jsonl'

  def write(rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    changes = {'teacher__path': '', 'teachers': (('math', wide), ('code', narrow))}
    return {**changes, 'data__train': str(path), 'data__eval': ''}

  return rows, write


@pytest.mark.slow
def test_a_run_with_two_teachers_and_its_resume(two, tmp_path):
  rows, write = two
  changes = write(rows)

  def run(workdir, **more):
    train.train(
      configs.validate(pairs.config('dopd', checkpoint__best='', **changes, **more)), workdir
    )
    found = report.read_metrics(f'{workdir}/metrics.jsonl')
    return [{k: v for k, v in r.items() if not k.startswith('time/')} for r in found]

  whole = run(str(tmp_path / 'a'))
  assert [r['step'] for r in whole] == [1, 2, 3, 4]
  assert all(np.isfinite(list(r.values())).all() for r in whole)


def test_mistakes_name_the_record(two, tmp_path):
  rows, write = two
  for change, sentence in (
    ({'teacher': 'maths'}, r"record r3 names the teacher 'maths'.*math, code"),
    ({'teacher': None}, 'record r3 names no teacher'),
  ):
    changes = write([r if r['id'] != 'r3' else {**r, **change} for r in rows])
    with pytest.raises(UserError, match=sentence):
      train.train(
        configs.validate(pairs.config('dopd', checkpoint__best='', **changes)), str(tmp_path / 'a')
      )
  with pytest.raises(UserError, match='set either teacher'):
    configs.validate(pairs.config('dopd', teachers=(('a', 'b'),)))
  with pytest.raises(UserError, match='teachers must be pairs'):
    configs.validate(pairs.config('dopd', teacher__path='', teachers=(('a', 'b'), ('a', 'c'))))


def test_a_teacher_may_wait_outside_and_lie_otherwise(tmp_path):
  """One that is parked, and split over `fsdp` alone, teaches as one that stays as the rules say."""

  def run(name, **more):
    config = pairs.config('dopd', steps=2, checkpoint__best='', mesh__tensor=2, **more)
    train.train(configs.validate(config), str(tmp_path / name))
    return report.read_metrics(str(tmp_path / name / 'metrics.jsonl'))

  changes = {'teacher__offload': True, 'teacher__split_over': ('fsdp',)}
  for row, want in zip(run('outside', **changes), run('inside'), strict=True):
    assert row.keys() == want.keys()
    for name, value in want.items():
      if not name.startswith('time/'):
        np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=name)

  config = configs.validate(pairs.config('dopd', mesh__tensor=2, **changes))
  mesh = sharding.make_mesh(1, -1, 2)
  pair = policies.load_pair(config, mesh, {'teacher'})
  params = pair.teacher.params
  assert teachers.is_parked(params) and not teachers.is_parked(pair.student.params)
  assert params['embedding'].sharding.spec == jax.P(None, 'fsdp')
  _, resident = teachers.given(pair.given)
  (head,) = resident['teacher'][''].values()
  assert head.sharding.memory_kind == 'device'


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'student__offload': True}, 'student.offload and student.split_over must stay'),
    ({'student__split_over': ('fsdp',)}, 'student.offload and student.split_over must stay'),
    ({'teacher__split_over': ('data',)}, "teacher.split_over may name fsdp and tensor, not 'data'"),
  ],
)
def test_layouts_that_cannot_be(changes, words):
  with pytest.raises(UserError, match=words):
    configs.validate(pairs.config('dopd', **changes))
