"""Rollouts one step ahead: whose weights sample, what is logged, and runs that are cut off."""

import contextlib
import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dopd_jax import (
  checkpoint,
  collate,
  collect,
  dataset,
  evaluation,
  metrics,
  policies,
  report,
  sharding,
  teachers,
  train,
  workdirs,
)
from dopd_jax import config as configs
from dopd_jax import state as states
from dopd_jax.errors import UserError
from dopd_jax.rollout import StopReason
from tests import pairs, vl_pairs

STEPS = 4


def config_of(method='dopd', **changes):
  changes = {'rollout__lag': 1, 'checkpoint__every': 1, 'checkpoint__keep': STEPS} | changes
  return configs.validate(pairs.config(method, steps=STEPS, **changes))


def rows(workdir):
  found = report.read_metrics(os.path.join(workdir, 'metrics.jsonl'))
  return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in found]


def saved(workdir, step=STEPS):
  found: Any = ocp.load(workdir / 'checkpoints' / f'{step:08d}' / 'state')
  return found


def cut(whole, workdir, step):
  """A copy of a run that was killed before any save after `step` was finished."""
  shutil.copytree(whole, workdir)
  for later in range(step + 1, STEPS + 1):
    os.unlink(workdir / 'checkpoints' / f'{later:08d}' / 'manifest.json')


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def sampled(monkeypatch):
  """The steps whose batches were sampled, in order."""
  steps, make_sample = [], collect.make_sample

  def make(*args):
    sample = make_sample(*args)

    def counted(params, by_context, images, examples, step):
      steps.append(step)
      return sample(params, by_context, images, examples, step)

    return counted

  monkeypatch.setattr(collect, 'make_sample', make)
  return steps


def by_hand(config):
  """Rows of metrics and the last parameters: the batch of step t from the weights it should have.

  Nothing here is ahead of anything: the weights after every update are kept.
  """
  objective = config.objective.build()
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  with jax.set_mesh(mesh):
    pair = policies.load_pair(config, mesh, objective.weights)
    pipeline = dataset.open_pipeline(config, pair, objective)
    tx = states.optimizer(config.optimizer, config.steps, objective.updates)
    state = states.place(states.create(pair.student.params, tx, objective), mesh)
    given, resident = teachers.given(pair.given)
    steps = train.compile_steps(config, pair, objective, tx, state)
    make = collect.make_collect(config, pair, objective, mesh)
    after, found = [jax.tree.map(jnp.copy, state.params)], []
    for step in range(1, config.steps + 1):
      lag = min(config.rollout.lag, step - 1)
      made = make(after[step - 1 - lag], next(pipeline), step)
      scored = steps.score(state, given, made.batch, resident)
      old, (state, updated) = state, steps.update(state, resident, made.batch, scored)
      assert all(x.is_deleted() for x in jax.tree.leaves(old.params))  # donated on a CPU as well
      after.append(jax.tree.map(jnp.copy, state.params))
      batch, scored, updated, stop = collate.fetch(
        (made.batch, scored, updated, made.rollout.stop_reason)
      )
      texts = evaluation.decode(pair.tokenizer, batch.tokens, batch.mask)
      rewards = evaluation.rewards(made.examples, texts)
      truncated = stop == StopReason.LENGTH.value
      found.append(
        metrics.of_update(batch, scored, updated, objective, rewards, truncated, lag=lag)
      )
  return found, state.params


@pytest.mark.parametrize('lag', [0, 1])
@pytest.mark.parametrize('method', ['dopd', 'thinking_machines'])
def test_the_loop_by_hand_gives_the_same_run(method, lag, tmp_path, sampled):
  config = config_of(method, rollout__lag=lag)
  train.train(config, str(tmp_path))
  assert sampled == [1, 2, 3, 4]  # none twice, and none that no step would train on
  want, params = by_hand(config)
  found = rows(tmp_path)[1:]
  assert [{k: v for k, v in row.items() if k in want[0]} for row in found] == want
  same(saved(tmp_path)['params'], params)
  assert [row['train/lag'] for row in found] == [0, lag, lag, lag]
  waits = [(tmp_path / 'checkpoints' / f'{s:08d}' / 'rollout').exists() for s in (1, 2, 3, 4)]
  assert waits == [bool(lag)] * 3 + [False]  # after the last step no batch comes
  gaps = [row['train/rollout_logp_gap'] for row in found]
  assert gaps[0] < 1e-4  # the weights that sampled are those that train
  assert all((gap > 1e-3) == bool(lag) for gap in gaps[1:])


LONG = [pytest.param(method, marks=pytest.mark.slow) for method in ('gkd', 'sdpo')]


@pytest.mark.parametrize('method', ['dopd', *LONG])
def test_a_run_cut_off_anywhere_goes_on_bit_for_bit(method, tmp_path, sampled, monkeypatch):
  """Also where the batch ahead is one of the data (gkd) or has rewards and siblings (sdpo)."""
  # A random student is never right, and then sdpo would have no hint and nothing to learn from.
  odd = lambda examples, texts: np.array([float(len(text) % 2) for text in texts])
  monkeypatch.setattr(evaluation, 'rewards', odd)
  config = config_of(method, rollout__samples=4)
  train.train(config, str(tmp_path / 'whole'))
  before = list(sampled)
  assert (before == [1, 2, 3, 4]) == (method != 'gkd')
  if method == 'sdpo':
    assert all(row['train/loss_token_share'] > 0 for row in rows(tmp_path / 'whole')[1:])
  for step in range(1, STEPS):
    sampled.clear()
    workdir = tmp_path / str(step)
    cut(tmp_path / 'whole', workdir, step)
    train.train(config, str(workdir))
    assert rows(workdir) == rows(tmp_path / 'whole')
    same(saved(workdir), saved(tmp_path / 'whole'))
    assert sampled == [s for s in before if s > step + 1]  # the batch of step + 1 was saved


@pytest.mark.slow
def test_a_run_on_images_reads_them_again(tmp_path):
  changes = {'rollout__lag': 1, 'checkpoint__every': 1, 'checkpoint__keep': STEPS, 'steps': STEPS}
  config = vl_pairs.config(**changes)
  train.train(config, str(tmp_path / 'whole'))
  cut(tmp_path / 'whole', tmp_path / 'cut', 2)
  train.train(config, str(tmp_path / 'cut'))
  assert rows(tmp_path / 'cut') == rows(tmp_path / 'whole')


def test_a_signal_saves_the_batch_ahead(tmp_path, sampled, monkeypatch):
  config = config_of(checkpoint__every=STEPS)
  train.train(config, str(tmp_path / 'whole'))
  sampled.clear()

  with monkeypatch.context() as patch:
    patch.setattr(workdirs, 'stop_signal', lambda: contextlib.nullcontext(lambda step: step == 2))
    train.train(config, str(tmp_path / 'stopped'))
  assert checkpoint.Checkpoints(str(tmp_path / 'stopped' / 'checkpoints')).steps() == [2]
  assert sampled == [1, 2, 3]
  train.train(config, str(tmp_path / 'stopped'))
  assert sampled == [1, 2, 3, 4]
  assert rows(tmp_path / 'stopped') == rows(tmp_path / 'whole')


def test_a_damaged_rollout_is_an_error_that_names_it(tmp_path):
  saves = checkpoint.Checkpoints(str(tmp_path))
  rollout = {'tokens': jnp.arange(16)}
  saves.save(1, {'step': jnp.int32(1)}, {'metrics': {}}, rollout)
  saves.wait()
  mesh = sharding.make_mesh(4, 2, 1)
  like = {'tokens': jax.ShapeDtypeStruct((16,), jnp.int32, sharding=sharding.rows(mesh))}
  same(saves.restore_rollout(1, like), rollout)
  path = max(
    (p for p in (tmp_path / '00000001' / 'rollout').rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  path.write_bytes(b'x' + path.read_bytes()[1:])
  with pytest.raises(UserError, match=f'damaged.*{path.name}'):
    saves.restore(1, {'step': jax.ShapeDtypeStruct((), jnp.int32)})


@pytest.mark.parametrize(
  'method, lag, sentence',
  [
    ('dopd', 2, 'rollout.lag must be 0 or 1, not 2'),
    ('dopd', -1, 'rollout.lag must be 0 or 1, not -1'),
    ('sft', 1, 'sft trains on the completions of the data.*set rollout.lag=0'),
  ],
)
def test_mistakes(method, lag, sentence):
  with pytest.raises(UserError, match=sentence):
    config_of(method, rollout__lag=lag)
