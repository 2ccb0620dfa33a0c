"""The main job on images: the steps, what is shared between completions, freezing, and mistakes."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopd_jax import (
  collect,
  dataset,
  models,
  policies,
  report,
  sharding,
  state,
  step,
  teachers,
  train,
)
from dopd_jax import config as configs
from dopd_jax.errors import UserError
from tests import pairs, vl_pairs


@pytest.fixture(autouse=True)
def mesh():
  """What a run has around it; it must not outlive the test."""
  with jax.set_mesh(sharding.make_mesh(1, -1, 1)):
    yield


def rows(workdir):
  found = report.read_metrics(os.path.join(workdir, 'metrics.jsonl'))
  return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in found]


def run(workdir, method='dopd', **changes):
  return train.train(vl_pairs.config(method, **changes), str(workdir))


@functools.cache
def world(method='dopd', **changes):
  """A rollout batch of images, and what is needed to train on it."""
  config = vl_pairs.config(method, **changes)
  objective = config.objective.build()
  mesh = sharding.make_mesh(1, -1, 1)
  pair = policies.load_pair(config, mesh, objective.weights)
  pipeline = dataset.open_pipeline(config, pair, objective)
  made = collect.make_collect(config, pair, objective, mesh)(pair.student.params, next(pipeline), 1)
  return objective, pair, made.batch


def update(method='dopd', batch=None, microbatch=8, frozen=False, **changes):
  """(signals, Updated, new parameters, old ones) of one SGD step."""
  objective, pair, own = world(method, **changes)
  batch, tx = batch or own, optax.sgd(0.1)
  given, resident = teachers.given(pair.given)
  steps = step.make_steps(
    pair.student.model,
    pair.models,
    objective,
    tx,
    live_vocab=len(pair.tokenizer),
    microbatch=microbatch,
    head_tile=4,
    samples=2,
    frozen_vision=frozen,
    banned_ids=pair.banned_ids,
  )
  now = state.create(pair.student.params, tx, objective)
  scored = jax.jit(steps.score)(now, given, batch)
  new, updated = jax.jit(steps.update)(now, resident, batch, scored)
  return scored.signals, updated, new.params, now.params


def close(a, b, atol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_a_run_on_images_and_its_resume(tmp_path):
  run(tmp_path / 'whole')
  found = rows(tmp_path / 'whole')
  assert [r['step'] for r in found] == [0, 1, 2, 3, 4]
  for row in found[1:]:
    assert row['train/rollout_logp_gap_max'] < 1e-4  # V11: the sampler saw what the trainer sees
    assert np.isfinite([v for v in row.values() if v is not None]).all()
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  os.unlink(tmp_path / 'cut' / 'checkpoints' / '00000004' / 'manifest.json')
  run(tmp_path / 'cut')
  assert rows(tmp_path / 'cut') == found
  page = (tmp_path / 'whole' / 'samples.html').read_text()
  assert 'data:image/png;base64,' in page and '<rect' in page


@pytest.mark.slow
def test_features_of_a_prompt_serve_all_its_completions():
  """Images given once a row, in place of once a prompt, change neither signals nor gradients."""
  _, _, batch = world()
  assert len(batch.images['full'].grid) * 2 == len(batch.tokens)
  repeated = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch.images)
  signals, updated, new, old = update()
  again = update(batch=batch._replace(images=repeated))
  close((signals, updated.loss, new), (again[0], again[1].loss, again[2]))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new['vision'], old['vision'])
  assert min(jax.tree.leaves(moved)) > 0  # the gradient reaches every part of the tower


@pytest.mark.parametrize('microbatch', [2, 4])
def test_micro_batches_change_nothing_on_images(microbatch):
  signals, updated, new, _ = update()
  again = update(microbatch=microbatch)
  close((signals, updated.loss, new), (again[0], again[1].loss, again[2]))


@pytest.mark.slow
def test_four_updates_are_four_shares():
  """Each sees the features of its own rows: the same as updates whose other rows have no weight.

  Four, where a prompt has two completions: so that the shares are of different prompts.
  """
  _, pair, batch = world('opd')
  given, _ = teachers.given(pair.given)
  tx = optax.sgd(0.1)
  steps = {
    n: step.make_steps(
      pair.student.model,
      pair.models,
      vl_pairs.config('opd', objective__updates=n).objective.build(),
      tx,
      live_vocab=len(pair.tokenizer),
      microbatch=4,
      head_tile=4,
      samples=2,
    )
    for n in (1, 4)
  }
  now = state.create(pair.student.params, tx, world('opd')[0])
  scored = jax.jit(steps[1].score)(now, given, batch)
  whole, _ = jax.jit(steps[4].update)(now, given, batch, scored)
  one = jax.jit(steps[1].update)
  for share in range(4):
    mine = (jnp.arange(len(batch.tokens)) % 4 == share)[:, None]
    plan = scored.plan._replace(coef=4 * scored.plan.coef * mine)
    now, _ = one(now, given, batch, scored._replace(plan=plan))
  close(whole.params, now.params)


def test_a_black_image_is_another_batch():
  _, _, batch = world()
  black = {
    'full': batch.images['full']._replace(patches=-jnp.ones_like(batch.images['full'].patches))
  }
  a, b = update()[0], update(batch=batch._replace(images=black))[0]
  for name in ('Sp', 'Tp'):
    assert np.abs(a[name].logp_y - b[name].logp_y).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('what', ['vision', 'tower', 'merger'])
def test_freezing(what, tmp_path):
  run(tmp_path, freeze=what, steps=2, checkpoint__every=2)
  from orbax.checkpoint import v1 as ocp

  saved = ocp.load(tmp_path / 'checkpoints' / '00000002' / 'state')['params']
  _, given = models.load(vl_pairs.pair()[0])
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), saved, given)
  tower = {k: v for k, v in moved['vision'].items() if k not in ('merger', 'deepstack_mergers')}
  merger = [moved['vision'][k] for k in ('merger', 'deepstack_mergers')]
  still, free = {
    'vision': ([tower, merger], []),
    'tower': ([tower], [merger]),
    'merger': ([merger], [tower]),
  }[what]
  assert not any(jax.tree.leaves(still))
  assert all(jax.tree.leaves(free)) and moved['embedding'] > 0


def test_frozen_vision_needs_no_gradient_of_its_own():
  """The decoder moves as it does beside a tower that moves."""
  (_, _, free, _), (_, _, still, old) = update(), update(frozen=True)
  close(free | {'vision': 0}, still | {'vision': 0})
  close(still['vision'], old['vision'], atol=0)


def test_v16_features_are_those_of_the_weights():
  """After a step of the tower alone, sampler and scorer see with the new tower."""
  objective, pair, batch = world()
  _, _, new, old = update()
  moved = {**old, 'vision': new['vision']}
  config = vl_pairs.config()
  given, _ = teachers.given(pair.given)
  steps = step.make_steps(
    pair.student.model,
    pair.models,
    objective,
    optax.sgd(0.1),
    live_vocab=len(pair.tokenizer),
    microbatch=8,
    head_tile=4,
    samples=2,
  )
  score = jax.jit(steps.score)
  before, after = (
    score(state.create(p, optax.sgd(0.1), objective), given, batch).signals for p in (old, moved)
  )
  assert np.abs(before['Sp'].logp_y - after['Sp'].logp_y).max() > 1e-6
  np.testing.assert_array_equal(before['Tp'].logp_y, after['Tp'].logp_y)
  pipeline = dataset.open_pipeline(config, pair, objective)
  sample = collect.make_collect(config, pair, objective, sharding.make_mesh(1, -1, 1))
  examples = next(pipeline)
  first, second = (sample(p, examples, 1).batch for p in (old, moved))
  assert (np.asarray(first.logp) != np.asarray(second.logp)).any()


# All but eopd: four updates on images are tested above.
@pytest.mark.slow
@pytest.mark.parametrize(
  'method', ['vision_opd', 'va_opd', 'opd', 'exopd', 'gkd', 'sdpo', 'tip', 'uni_opd', 'opsd']
)
def test_methods_on_images(method, tmp_path):
  run(tmp_path, method, steps=2, rollout__samples=4, checkpoint__best='')
  last = rows(tmp_path)[-1]
  assert np.isfinite([v for v in last.values() if v is not None]).all()


def test_crops_frames_and_degraded_images_are_other_views():
  """Vision-OPD's teacher reads a prompt of another length; VA-OPD's the same ids."""
  _, _, batch = world('vision_opd')
  assert set(batch.prompts) == {'plain', 'plain+crop'} and set(batch.images) == {'full', 'crop'}
  assert (batch.prompts['plain'].length != batch.prompts['plain+crop'].length).any()
  _, _, batch = world('vision_opd', objective__evidence='boxed')
  assert set(batch.prompts) == {'plain', 'plain+boxed'} and set(batch.images) == {'full', 'boxed'}
  full, boxed = batch.images['full'], batch.images['boxed']
  np.testing.assert_array_equal(full.grid, boxed.grid)
  assert (np.abs(full.patches - boxed.patches).max((1, 2, 3)) > 0.1).all()  # a frame in every one
  np.testing.assert_array_equal(batch.prompts['plain'].tokens, batch.prompts['plain+boxed'].tokens)
  _, _, batch = world('va_opd')
  full, degraded = batch.images['full'], batch.images['degraded']
  np.testing.assert_array_equal(full.grid, degraded.grid)
  assert np.abs(full.patches - degraded.patches).max() > 0.1
  plain, other = batch.prompts['plain'], batch.prompts['plain+degraded']
  np.testing.assert_array_equal(plain.tokens, other.tokens)


@pytest.mark.slow
def test_rows_with_and_without_images(tmp_path):
  from dopd_jax import tasks

  records = tasks.make_records('digits', 12, 0)
  for record in records[::2]:
    record.pop('images'), record.pop('boxes'), record.pop('labels')
  for i, record in enumerate(records[1::2]):
    path = tmp_path / f'{i}.png'
    path.write_bytes(record.pop('images')[0])
    record['images'] = [path.name]  # relative to the folder of the data
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps(record) + '\n' for record in records))
  run(tmp_path / 'run', data__train=str(data), steps=2, rollout__prompts=8)
  assert all(row['train/rollout_logp_gap_max'] < 1e-4 for row in rows(tmp_path / 'run')[1:])


def test_mistakes(tmp_path):
  text_student, text_teacher = pairs.pair()
  for changes, sentence in (
    (
      {'student__path': text_student, 'teacher__path': text_teacher},
      r'[Rr]ecord digits/train/0/0 has images and this run reads text only',
    ),
    ({'data__patch_bucket': 6}, 'must be a multiple of 4'),
    ({'data__max_prompt_tokens': 8}, 'image of 32 x 32 pixels alone has 16 tokens'),
  ):
    with pytest.raises(UserError, match=sentence):
      run(tmp_path / 'run', **changes)
    assert not (tmp_path / 'run').exists()
  with pytest.raises(UserError, match='looks at the crop image of a record, and these models'):
    train.train(configs.validate(pairs.config('vision_opd')), str(tmp_path / 'run'))


def test_placeholders_are_never_sampled():
  _, pair, batch = world()
  banned = pair.banned_ids
  assert len(banned) >= 3 and not np.isin(np.asarray(batch.tokens), banned).any()


@pytest.mark.parametrize('evidence', ['crop', 'boxed'])
def test_evidence_needs_boxes(evidence, tmp_path):
  from dopd_jax import tasks

  records = tasks.make_records('digits', 3, 0)
  for record in records:
    record.pop('boxes'), record.pop('labels')
    path = tmp_path / f'{record["id"].replace("/", "-")}.png'
    path.write_bytes(record.pop('images')[0])
    record['images'] = [path.name]
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps(record) + '\n' for record in records))
  with pytest.raises(UserError, match=f'Record digits/.* no boxes, and the view {evidence} is'):
    run(tmp_path / 'run', 'vision_opd', objective__evidence=evidence, data__train=str(data))
  assert not (tmp_path / 'run').exists()


def test_v11_policies_that_cut_images_differently_are_refused(tmp_path):
  _, teacher = vl_pairs.pair()
  other = tmp_path / 'teacher'
  shutil.copytree(teacher, other)
  path = other / 'preprocessor_config.json'
  facts = json.loads(path.read_text())
  facts['image_mean'] = [0.4, 0.5, 0.5]
  path.write_text(json.dumps(facts))
  with pytest.raises(UserError, match='cut images differently'):
    run(tmp_path / 'run', teacher__path=str(other))
