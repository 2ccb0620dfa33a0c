"""The main job from config to pages, in process; commands and kills are in test_commands.py."""

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import (
  checkpoint,
  dataset,
  evaluation,
  glossary,
  models,
  policies,
  report,
  sharding,
  tasks,
  train,
)
from dopd_jax import config as configs
from dopd_jax.errors import Stopped, UserError
from tests import pairs


def rows(workdir, timing=False):
  found = report.read_metrics(os.path.join(workdir, 'metrics.jsonl'))
  return [{k: v for k, v in row.items() if timing or not k.startswith('time/')} for row in found]


def run(workdir, method='dopd', **changes):
  own = pairs.config(method).data.eval
  changes = {
    'data__evals': (('same', own), ('other', own.replace('size=8&seed=1', 'size=16&seed=5')))
  } | changes
  return train.train(configs.validate(pairs.config(method, **changes)), str(workdir))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  run(workdir)
  return workdir


def test_a_run_leaves_what_it_promises(finished):
  names = os.listdir(finished)
  assert {'config.json', 'metrics.jsonl', 'tensorboard', 'report.png', 'samples.html'} <= set(names)
  found = rows(finished, timing=True)
  assert [r['step'] for r in found] == [0, 1, 2, 3, 4]
  assert {'eval/accuracy', 'eval/teacher_accuracy'} <= set(found[0])
  assert ['eval/accuracy' in r for r in found] == [True, False, True, False, True]
  for row in found[1:]:
    shares = [row[f'train/regime_share/{r}'] for r in ('LH', 'LL', 'HT', 'HS')]
    assert math.isclose(sum(shares), 1.0, abs_tol=1e-9)
    parts = [row[f'train/regime_loss/{r}'] for r in ('LH', 'LL', 'HT', 'HS')]
    assert math.isclose(sum(parts), row['train/loss'], rel_tol=1e-5)
    assert row['train/rollout_logp_gap_max'] < 1e-4  # the sampler's log-prob is the trainer's
    for name in ('S', 'Sp', 'Tp'):
      assert 0 < row[f'train/entropy/{name}'] <= math.log(57)
    assert row['time/tokens_per_second'] > 0
  assert all(v is not None for row in found for v in row.values())


def test_what_is_right_is_kept_by_record(finished):
  """At every look, and it is what the accuracy is the mean of."""
  looks = {r['step']: r['eval/accuracy'] for r in rows(finished) if 'eval/accuracy' in r}
  files = sorted((finished / 'judged').iterdir())
  assert [file.name for file in files] == [f'{step:08d}.json' for step in looks]
  for file, accuracy in zip(files, looks.values()):
    rewards = json.loads(file.read_text())
    assert len(rewards) == 8 and all(name.startswith('plan_execute/test/1/') for name in rewards)
    assert math.isclose(sum(rewards.values()) / 8, accuracy)


def test_more_held_out_sets_are_told_by_name(finished):
  for row in rows(finished):
    if 'eval/accuracy' in row:
      assert row['eval/accuracy/same'] == row['eval/accuracy']
      assert row['eval/accuracy_high/same'] == row['eval/accuracy_high']
      right = round(16 * row['eval/accuracy/other'])  # of other records, and twice as many
      assert row['eval/accuracy_high/other'] == report.wilson_interval(right, 16)[1]
  assert {'eval/teacher_accuracy/same', 'eval/teacher_accuracy_low/other'} <= set(rows(finished)[0])
  assert glossary.metric('eval/accuracy/other').label == 'Accuracy, held out: other'
  assert glossary.metric('eval/accuracy_low/other').unit == 'share'
  kept = json.loads((finished / 'checkpoints' / '00000004' / 'run.json').read_text())
  digest = {name: kept['records'][f'data.{name}'] for name in ('eval', 'evals.same', 'evals.other')}
  assert digest['evals.same'] == digest['eval'] != digest['evals.other']


def test_metrics_have_a_meaning(finished):
  """Every number that a run writes is explained in one place."""
  for row in rows(finished):
    for name in row:
      assert name == 'step' or glossary.metric(name).meaning, name


def test_tensorboard_holds_the_same_numbers(finished):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  board = EventAccumulator(str(finished / 'tensorboard'))
  board.Reload()
  shown = {(name, e.step): e.value for name in board.Tags()['scalars'] for e in board.Scalars(name)}
  written = {
    (name, row['step']): value
    for row in report.read_metrics(finished / 'metrics.jsonl')
    for name, value in row.items()
    if name != 'step' and value is not None
  }
  assert shown == pytest.approx(written, rel=1e-6)


def test_sampling_twice_gives_the_same_run(finished, tmp_path):
  run(tmp_path / 'again')
  assert rows(tmp_path / 'again') == rows(finished)


def test_resume_goes_on_bit_for_bit(finished, tmp_path):
  """A run whose newer checkpoint never got its manifest goes on from the older one."""
  shutil.copytree(finished, tmp_path / 'cut')
  os.unlink(tmp_path / 'cut' / 'checkpoints' / '00000004' / 'manifest.json')
  with open(tmp_path / 'cut' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 5, "train/lo')  # a line that a kill broke
  run(tmp_path / 'cut')
  assert rows(tmp_path / 'cut') == rows(finished)
  final = [
    json.loads((d / 'checkpoints' / '00000004' / 'run.json').read_text())
    for d in (tmp_path / 'cut', finished)
  ]
  assert final[0]['data'] == final[1]['data']


def test_a_finished_run_is_left_alone(finished):
  before = (finished / 'metrics.jsonl').read_text()
  run(finished)
  assert (finished / 'metrics.jsonl').read_text() == before


def test_a_run_ends_at_the_accuracy_it_was_to_stop_at(tmp_path, monkeypatch):
  """At the first look, of steps 2 and 4, that reaches it; the same command then does nothing."""
  right = lambda examples, texts: np.ones(len(texts))
  monkeypatch.setattr(evaluation, 'rewards', right)
  changes = {'steps': 6, 'evaluation__stop_at': 0.9, 'checkpoint__every': 1}
  run(tmp_path / 'whole', **changes)
  before = rows(tmp_path / 'whole')
  assert [row['step'] for row in before] == [0, 1, 2] and before[-1]['eval/accuracy'] == 1.0
  assert (tmp_path / 'whole' / 'checkpoints' / '00000002' / 'manifest.json').exists()
  assert (tmp_path / 'whole' / 'report.png').exists()
  run(tmp_path / 'whole', **changes)
  assert rows(tmp_path / 'whole') == before

  # Cut off before its first look: what the start looked like ends no run.
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  os.unlink(tmp_path / 'cut' / 'checkpoints' / '00000002' / 'manifest.json')
  run(tmp_path / 'cut', **changes)
  assert rows(tmp_path / 'cut') == before


def test_a_workdir_keeps_its_config(finished):
  run(finished, log__every=7)  # cadence may change
  with pytest.raises(UserError, match=r'belongs to another config.*seed \(was 0, is 1\)'):
    run(finished, seed=1)


def cut_off(finished, workdir):
  """The finished run as it was at its first checkpoint."""
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '00000004')
  return workdir


def test_who_ran_out_of_memory_goes_on_with_other_memory_settings(finished, tmp_path, caplog):
  workdir = cut_off(finished, tmp_path / 'run')
  with caplog.at_level('INFO'):
    run(workdir, microbatch=16, remat=False, teacher__offload=True)
  assert 'Rounding may differ' in caplog.text and 'microbatch (was 8, is 16)' in caplog.text
  for row, before in zip(rows(workdir), rows(finished), strict=True):
    assert row['train/loss' if row['step'] else 'eval/accuracy'] == pytest.approx(
      before['train/loss' if row['step'] else 'eval/accuracy'], rel=1e-3
    )


def test_a_damaged_newest_checkpoint_costs_one_interval(finished, tmp_path, caplog):
  shutil.copytree(finished, tmp_path / 'run')
  (tmp_path / 'run' / 'checkpoints' / '00000004' / 'run.json').write_text('{}')
  with caplog.at_level('INFO'):
    run(tmp_path / 'run')
  assert '00000004 is damaged' in caplog.text and 'Going on from step 2 of 4' in caplog.text
  assert rows(tmp_path / 'run') == rows(finished)


def test_data_that_changed_between_runs_are_noticed(finished, tmp_path, monkeypatch):
  """Also where no prompt did: the answers of the held-out problems judge the run."""
  workdir = cut_off(finished, tmp_path / 'run')
  before = (workdir / 'metrics.jsonl').read_bytes()
  load = dataset.LOADERS['task']

  def other(spec):
    made = load(spec)
    return [{**made[0], 'answer': 'no'}, *made[1:]] if 'split=test' in spec else made

  monkeypatch.setitem(dataset.LOADERS, 'task', other)
  with pytest.raises(UserError, match=r'records of data\.eval are not those'):
    run(workdir)
  assert (workdir / 'metrics.jsonl').read_bytes() == before


@pytest.mark.parametrize('method', ['opd', 'sft'])
def test_other_methods(method, tmp_path):
  run(tmp_path, method, steps=2)
  last = rows(tmp_path)[-1]
  assert last['train/regime_share/all'] == 1.0 and last['train/grad_norm'] > 0


COMPARED = [
  'eval/accuracy', 'eval/reverse_kl', 'eval/forward_kl', 'train/entropy/S', 'train/grad_norm',
  'train/loss_token_share', 'train/effective_weight', 'train/extra_forwards', 'time/score_seconds',
]  # fmt: skip


@pytest.mark.slow
def test_every_method_trains_and_says_the_same_things(tmp_path, monkeypatch):
  """From one seed: finite, no two alike, and all measured under the same names."""
  from dopd_jax import evaluation, objectives

  # A random student is never right, and then some methods would have nothing to learn from.
  monkeypatch.setattr(
    evaluation, 'rewards', lambda examples, texts: np.array([float(len(t) % 2) for t in texts])
  )
  ends = {}
  for method in objectives.METHODS.keys() - {'vision_opd', 'va_opd', 'sft'}:
    more = {'objective__threshold': 3.0} if method == 'eopd' else {}
    run(tmp_path / method, method, rollout__samples=4, checkpoint__best='', **more)
    found = rows(tmp_path / method, timing=True)
    for name in COMPARED:
      assert np.isfinite(found[-1][name]), (method, name)
    assert all(
      v is not None and glossary.metric(k).meaning for k, v in found[-1].items() if k != 'step'
    )
    ends[method] = tuple(row['eval/reverse_kl'] for row in found if 'eval/reverse_kl' in row)
  assert len(set(ends.values())) == len(ends), ends


def test_an_objective_that_needs_rewards_needs_verifiers(tmp_path):
  record = {'prompt': 'a = 5 ? a', 'privileged_context': 'a'}
  (tmp_path / 'data.jsonl').write_text(json.dumps(record) + '\n')
  with pytest.raises(UserError, match='names no verifier, and uni_opd needs to know'):
    run(tmp_path / 'run', 'uni_opd', data__train=str(tmp_path / 'data.jsonl'))


def test_hints_that_are_all_blank_are_an_error(tmp_path):
  record = {'prompt': 'a = 5 ? a', 'privileged_context': ' '}
  (tmp_path / 'data.jsonl').write_text(json.dumps(record) + '\n')
  with pytest.raises(UserError, match=r"every privileged_context of the data is blank.*'none'"):
    run(tmp_path / 'run', data__train=str(tmp_path / 'data.jsonl'))


def test_a_reference_that_is_asked_for_must_be_given(tmp_path):
  with pytest.raises(UserError, match=r'set reference\.path'):
    run(tmp_path / 'run', 'exopd', objective__reference='reference')
  _, teacher = pairs.pair()
  run(tmp_path / 'run', 'exopd', objective__reference='reference', reference__path=teacher, steps=1)
  assert rows(tmp_path / 'run')[-1]['train/entropy/R'] > 0


@pytest.mark.parametrize('method', ['gkd', 'sdpo'])
def test_methods_with_a_coin_or_siblings_resume_bit_for_bit(method, tmp_path):
  run(tmp_path / 'whole', method)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  os.unlink(tmp_path / 'cut' / 'checkpoints' / '00000004' / 'manifest.json')
  run(tmp_path / 'cut', method)
  assert rows(tmp_path / 'cut') == rows(tmp_path / 'whole')


def test_curriculum_and_self_reference_survive_a_resume(tmp_path):
  stage = 'task:plan_execute?size=16&seed={}&steps=2&definitions=4'
  changes = {
    'data__train': '',
    'data__stages': ((stage.format(0), 3), (stage.format(5), 1)),
    'objective__self_reference': 'ema',
  }
  run(tmp_path / 'whole', **changes)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  os.unlink(tmp_path / 'cut' / 'checkpoints' / '00000004' / 'manifest.json')
  run(tmp_path / 'cut', **changes)
  assert rows(tmp_path / 'cut') == rows(tmp_path / 'whole')


def test_without_privileged_context(tmp_path):
  """data.privileged='none': Sp is S, so the self-regularised regimes carry nothing."""
  run(tmp_path, data__privileged='none', steps=1)
  last = rows(tmp_path)[-1]
  assert abs(last['train/regime_loss/LL']) + abs(last['train/regime_loss/HS']) < 1e-5
  assert abs(last['train/entropy/S'] - last['train/entropy/Sp']) < 1e-5


def test_a_broken_loss_stops_the_run_and_saves_nothing_after(tmp_path, monkeypatch):
  from dopd_jax import state as states

  create = states.create

  def broken(params, tx, objective):
    state = create(params, tx, objective)
    table = state.params['embedding'].at[9].set(jnp.nan)
    return state._replace(params=state.params | {'embedding': table})

  monkeypatch.setattr(states, 'create', broken)
  with pytest.raises(Stopped, match=r'not finite at step 1 .*records: plan_execute/.*step 0'):
    run(tmp_path)
  assert checkpoint.Checkpoints(str(tmp_path / 'checkpoints')).steps() == []


def test_same_parameters_twice_is_an_error(tmp_path):
  student, _ = pairs.pair()
  shutil.copytree(student, tmp_path / 'copy')
  with pytest.raises(UserError, match=r'teacher and student have the same parameters'):
    run(tmp_path / 'run', teacher__path=str(tmp_path / 'copy'))


def test_different_tokenizers_are_an_error(tmp_path):
  tokenizer = tasks.plan_execute.tokenizer()
  tokenizer.add_tokens(['another'])
  other = pairs.write(tmp_path / 'teacher', pairs.architecture(1, 8, vocab=64), 3, tokenizer)
  with pytest.raises(UserError, match=r"another tokenizer than the student.*'another'"):
    run(tmp_path / 'run', teacher__path=other)


def test_an_all_zero_teacher_is_an_error(tmp_path):
  config = pairs.architecture(1, 8)
  params = models.build(config).init(jax.random.key(0))
  zero = {k: np.zeros_like(v) if not isinstance(v, dict) else v for k, v in params.items()}
  models.save(tmp_path / 'zero', config, zero, tokenizer=tasks.plan_execute.tokenizer())
  with pytest.raises(UserError, match='zero'):
    run(tmp_path / 'run', teacher__path=str(tmp_path / 'zero'))


def test_mistakes_before_the_first_step(tmp_path):
  for changes, sentence in (
    ({'teacher__path': ''}, 'set teacher.path'),
    ({'teacher__path': str(tmp_path / 'nowhere')}, 'nowhere'),
    ({'data__max_prompt_tokens': 125}, 'over the context of the student'),
    ({'mesh__data': 3, 'mesh__fsdp': 1}, 'does not fit'),
    ({'rollout__prompts': 4}, r'rollout.prompts .4. must be a multiple of the 8 shards'),
    ({'data__train': str(tmp_path / 'no.jsonl')}, 'no.jsonl'),
    ({'data__max_prompt_tokens': 3}, 'too long'),
  ):
    with pytest.raises(UserError, match=sentence):
      run(tmp_path / 'run', **changes)
    assert not (tmp_path / 'run').exists()  # a corrected command must not meet a stranger's workdir


def test_frozen_self_is_the_given_student(tmp_path):
  """The frozen copy is made from the given weights, not read again from where they came."""
  run(tmp_path, objective__self_reference='frozen', steps=1)
  config = configs.validate(pairs.config())
  mesh = sharding.make_mesh(1, -1, 1)
  given = policies.load_pair(config, mesh).student.params
  saves = checkpoint.Checkpoints(str(tmp_path / 'checkpoints'))
  from orbax.checkpoint import v1 as ocp

  saved = ocp.load(tmp_path / 'checkpoints' / f'{saves.steps()[-1]:08d}' / 'state')
  np.testing.assert_array_equal(saved['frozen']['embedding'], given['embedding'])
  assert np.abs(saved['params']['embedding'] - given['embedding']).max() > 0


def test_supervised_training_needs_completions(tmp_path):
  data = tmp_path / 'bare.jsonl'
  data.write_text('{"prompt": "a = 5 ? a"}\n')
  with pytest.raises(UserError, match='there is no completion, and sft trains on it'):
    run(tmp_path / 'run', 'sft', data__train=str(data))


@pytest.mark.parametrize(
  'record, sentence',
  [({'verifier': 'exactly'}, 'no verifier'), ({'verifier': 'exact'}, 'exact needs an answer')],
)
def test_a_verifier_that_cannot_judge_is_found_before_the_first_step(tmp_path, record, sentence):
  record = {'prompt': 'a = 5 ? a', 'privileged_context': 'a', **record}
  (tmp_path / 'data.jsonl').write_text(json.dumps(record) + '\n')
  for name in ('data__train', 'data__eval'):
    with pytest.raises(UserError, match=sentence):
      run(tmp_path / 'run', **{name: str(tmp_path / 'data.jsonl')})
  assert not (tmp_path / 'run').exists()


def test_the_best_checkpoint_is_one_that_was_measured(tmp_path):
  run(tmp_path, steps=4, checkpoint__every=1, checkpoint__keep=4, evaluation__every=2)
  saves = checkpoint.Checkpoints(str(tmp_path / 'checkpoints'), 4, 'eval/accuracy')
  named = {
    step: 'eval/accuracy'
    in json.loads((tmp_path / 'checkpoints' / f'{step:08d}' / 'run.json').read_text())['metrics']
    for step in saves.steps()
  }
  assert named == {1: False, 2: True, 3: False, 4: True}
  assert saves.best_step() == 4
