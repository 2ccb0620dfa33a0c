"""Comparisons: what a grid runs, what it skips, and what the command says."""

import dataclasses
import hashlib
import json
import pathlib
import re

import pytest
from rich.console import Console

from dopd_jax import config as configs
from dopd_jax import tasks, workdirs
from dopd_jax.errors import Stopped, UserError
from experiments import grid, models, results, run, study, tables, workers
from experiments.grid import Arm, Experiment

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENT = Experiment(
  question='Which?',
  base='configs/quickstart.py',
  arms={
    'opd': Arm('method=opd'),
    'dopd': Arm('method=dopd', {'objective.k': 5, 'objective.trim': 0.0512345678}),
  },
  seeds=(0, 1, 2),
  learning_rates=(2e-4, 5e-4, 1e-3),
  tuning_seeds=(100, 101),
  changes={'steps': 4, 'optimizer.warmup_steps': 0},
  tuning_changes={'data.eval': 'task:plan_execute?split=train&size=8', 'evaluation.every': 0},
)
# The best rates are 5e-4 and 1e-3; a seed counts the same in both arms.
BEST = {'opd': {2e-4: 0.5, 5e-4: 0.6, 1e-3: 0.55}, 'dopd': {2e-4: 0.3, 5e-4: 0.4, 1e-3: 0.5}}


class Trainer:
  """Stands for `train`: writes what a run leaves behind, and remembers what it ran."""

  def __init__(self, stops=lambda config: False):
    self.stops, self.ran = stops, []

  def __call__(self, config, workdir, console):
    self.ran.append(config)
    workdirs.claim(workdir, config)
    end = BEST[config.objective.name][config.optimizer.learning_rate] + config.seed / 100
    rows = [{'step': 0, 'eval/accuracy': 0.25, 'eval/teacher_accuracy': 0.7}]
    for step in range(1, config.steps + 1):
      rows.append({'step': step, 'train/loss': step / 3, 'time/step_seconds': 100.0 / step**2})
    rows[-1]['eval/accuracy'] = end
    workdirs.write_judged(workdir, 0, ['a', 'b', 'c'], [0, 0, 0])
    workdirs.write_judged(workdir, config.steps, ['a', 'b', 'c'], [1, 0, 1])
    stopped = self.stops(config)
    with open(pathlib.Path(workdir) / 'metrics.jsonl', 'w') as file:
      file.writelines(json.dumps(row) + '\n' for row in rows[: 2 if stopped else None])
    if stopped:
      raise Stopped('the loss is not finite at step 2')


def walk(out, trainer, experiment=EXPERIMENT, **kwargs):
  def execute(todo):
    for one in todo:
      yield one, workers.perform(one, out, out / 'runs', train=trainer)

  run.walk(experiment, list(experiment.arms), out, execute, Console(quiet=True), **kwargs)
  return trainer.ran


def result(arm, seed, value, **more):
  rows = [{'step': 0, 'eval/accuracy': 0.5}, {'step': 4, 'eval/accuracy': value}]
  about = {'learning_rate': 5e-4, 'config': {}, 'means': {'train/entropy/S': value}}
  return {'arm': arm, 'seed': seed, 'rows': rows, **about, **more}


# ------------------------------------------------------------------------------------------ a walk


def test_a_walk_tunes_then_runs_every_arm_at_its_own_rate(tmp_path):
  ran = walk(tmp_path, Trainer())
  tuning, final = ran[:12], ran[12:]
  cell = lambda c: (c.objective.name, c.optimizer.learning_rate, c.seed)
  assert sorted(map(cell, tuning)) == sorted(
    (arm, rate, seed) for arm in BEST for rate in BEST[arm] for seed in (100, 101)
  )
  assert all('split=test' not in c.data.eval and not c.evaluation.every for c in tuning)
  assert sorted(map(cell, final)) == sorted(
    (arm, rate, seed) for arm, rate in (('opd', 5e-4), ('dopd', 1e-3)) for seed in (0, 1, 2)
  )
  assert all('split=test' in c.data.eval and c.evaluation.every == 25 for c in final)
  assert all(c.steps == 4 for c in ran)
  assert {c.objective.k for c in ran if c.objective.name == 'dopd'} == {5}
  assert len(list((tmp_path / 'tuning').glob('*.json'))) == 12
  assert (tmp_path / 'tuning' / 'opd.lr0.0005.seed100.json').exists()
  assert (tmp_path / 'results' / 'dopd.seed2.json').exists()


DECLARED = {
  p.parent.name: grid.load(p.parent.name) for p in ROOT.glob('experiments/*/experiment.py')
}


@pytest.mark.parametrize('pool', sorted({e.pool or name for name, e in DECLARED.items()}))
def test_what_is_committed_is_what_the_command_would_run(pool):
  """So that it goes on where it stopped, on the code of today; and no file is of another run."""
  out = ROOT / 'experiments' / pool
  kept = {p for kind in ('tuning', 'results') for p in (out / kind).glob('*.json')}
  known = {}
  for name, experiment in DECLARED.items():
    if (experiment.pool or name) != pool:
      continue
    tuning = grid.tuning_runs(experiment, list(experiment.arms))
    tuned = {
      arm for arm in experiment.arms if all(r.file(out).exists() for r in tuning if r.arm == arm)
    }
    rates = results.rates(experiment, [r for r in tuning if r.arm in tuned], out) if tuning else {}
    planned = [
      *tuning,
      *grid.final_runs(experiment, {arm: rates.get(arm) for arm in experiment.arms}),
    ]
    files = {r.file(out): r for r in planned}
    assert planned
    if (ROOT / 'experiments' / name / 'table.md').exists():  # every number of it has its file
      assert files.keys() <= kept
    for file, one in files.items():  # arms of one name are one run
      assert file not in known or known[file].config == one.config
    known |= files
  assert kept <= known.keys()
  there = [known[file] for file in sorted(kept)]
  assert all(results.done(one, out) for one in there)
  for one in there[:1]:
    other = dataclasses.replace(one.config, steps=7)
    with pytest.raises(
      UserError, match=r'another config, which differs in steps \(was \d+, is 7\)'
    ):
      results.done(dataclasses.replace(one, config=other), out)


def test_a_result_file_says_what_ran(tmp_path):
  walk(tmp_path, Trainer())
  path = tmp_path / 'results' / 'dopd.seed1.json'
  got = json.loads(path.read_text())
  one = next(r for r in grid.final_runs(EXPERIMENT, {'dopd': 1e-3}) if r.seed == 1)
  assert got['config'] == json.loads(configs.to_json(one.config))
  assert (got['arm'], got['seed'], got['learning_rate']) == ('dopd', 1, 1e-3)
  assert got['config']['objective']['k'] == 5
  assert {'jax', 'python'} <= got['versions'].keys()
  assert [row['step'] for row in got['rows']] == [0, 4]
  assert got['rows'][1]['train/loss'] == 1.33333  # a whole row, six digits
  # (1 + 2 + 3 + 4) / 3 / 4; the median of 100, 25, 11.1, 6.25; their sum
  assert got['means'] == {'train/loss': 0.833333, 'time/step_seconds': 18.0556}
  assert got['judged'] == '101'
  assert got['wall_seconds'] == 142.361
  assert 'stopped' not in got


def test_only_what_has_no_result_runs_again(tmp_path):
  walk(tmp_path, Trainer())
  assert walk(tmp_path, Trainer()) == []
  (tmp_path / 'results' / 'opd.seed1.json').unlink()
  again = walk(tmp_path, Trainer())
  assert [(c.objective.name, c.seed) for c in again] == [('opd', 1)]


def test_the_result_of_another_config_is_an_error(tmp_path):
  walk(tmp_path / 'a', Trainer())
  other = dataclasses.replace(EXPERIMENT, changes=EXPERIMENT.changes | {'steps': 5})
  trainer = Trainer()
  with pytest.raises(UserError, match=r'opd\.lr0\.0002\.seed100\.json .*delete it or .*--out'):
    walk(tmp_path / 'a', trainer, other)
  assert trainer.ran == []
  assert len(walk(tmp_path / 'b', Trainer(), other)) == 18


def test_a_model_made_anew_is_not_compared_with_the_old_one(tmp_path):
  """With other rounding a training ends in another student, and no difference is paired then."""
  student = tmp_path / 'student'
  student.mkdir()
  (student / 'model.safetensors').write_bytes(b'weights')
  own = dataclasses.replace(EXPERIMENT, changes=EXPERIMENT.changes | {'student.path': str(student)})
  out = tmp_path / 'out'
  walk(out, Trainer(), own)
  kept = json.loads((out / 'results' / 'opd.seed1.json').read_text())['models']
  assert kept == {str(student): hashlib.sha256(b'weights').hexdigest()}
  (out / 'results' / 'opd.seed1.json').unlink()
  (student / 'model.safetensors').write_bytes(b'others')
  trainer = Trainer()
  with pytest.raises(
    UserError, match=r'student is not the model that results in .* began with: bring'
  ):
    walk(out, trainer, own)
  assert trainer.ran == []
  workers.perform(grid.final_runs(own, {'opd': 1e-3})[0], out / 'b', out / 'rb', train=Trainer())
  with pytest.raises(UserError, match='began with other models: bring them back, or delete it'):
    workers.perform(grid.final_runs(own, {'opd': 5e-4})[1], out, out / 'runs', train=trainer)
  assert trainer.ran == []
  (out / 'b' / 'results' / 'opd.seed0.json').rename(out / 'results' / 'opd.seed1.json')
  with pytest.raises(UserError, match='student is not the model that results in'):
    results.read(own, out, 'results')
  (out / 'results' / 'opd.seed1.json').unlink()
  (student / 'model.safetensors').write_bytes(b'weights')
  assert len(walk(out, trainer, own)) == 1


def test_a_broken_result_is_an_error(tmp_path):
  walk(tmp_path, Trainer())
  path = tmp_path / 'results' / 'opd.seed1.json'
  for text in ('{"arm": "o', '[]', '{"arm": "opd"}'):
    path.write_text(text)
    with pytest.raises(UserError, match=r'opd\.seed1\.json is not a whole result'):
      walk(tmp_path, Trainer())


def test_a_stopped_run_is_a_result(tmp_path):
  high = lambda config: config.optimizer.learning_rate == 1e-3
  last = lambda config: config.objective.name == 'opd' and config.seed == 2
  trainer = Trainer(stops=lambda config: high(config) or last(config))
  ran = walk(tmp_path, trainer)
  assert len(ran) == 18
  assert {c.optimizer.learning_rate for c in ran[12:]} == {5e-4}
  got = json.loads((tmp_path / 'results' / 'opd.seed2.json').read_text())
  assert got['stopped'] == 'the loss is not finite at step 2'
  assert walk(tmp_path, trainer)[18:] == []
  run.write(EXPERIMENT, 'x', tmp_path, tmp_path, Console(quiet=True))
  page = (tmp_path / 'table.md').read_text()
  assert '| opd | 0.0005 | 2 (1 stopped) |' in page
  assert '| dopd | 0.001 | stopped | stopped | stopped |  |' in page


def test_experiments_share_the_arms_of_a_pool(tmp_path):
  walk(tmp_path / 'pool', Trainer())
  arms = {'opd': EXPERIMENT.arms['opd'], 'cold': Arm('method=opd', {'evaluation.temperature': 0.5})}
  other = dataclasses.replace(
    EXPERIMENT, arms=arms, seeds=(0, 1), contrasts=[('cold', 'opd')], pool='pool'
  )
  ran = walk(tmp_path / 'pool', Trainer(), other)
  assert len(ran) == 6 + 2 and all(c.evaluation.temperature == 0.5 for c in ran)
  run.write(other, 'x', tmp_path / 'pool', tmp_path, Console(quiet=True))
  page = (tmp_path / 'table.md').read_text()
  assert 'dopd' not in page and '| opd | 0.0005 | 2 |' in page
  assert '| cold - opd | 2 | +0.0 ± 0.0 |' in page
  with pytest.raises(UserError, match="unknown arm in contrasts 'col'"):
    dataclasses.replace(EXPERIMENT, contrasts=[('col', 'opd')])


def test_a_run_that_was_cut_off_leaves_no_result(tmp_path):
  one = grid.final_runs(EXPERIMENT, {'opd': 5e-4})[0]

  def train(config, workdir, console):
    Trainer()(dataclasses.replace(config, steps=3), workdir, console)

  with pytest.raises(workers.Cut):
    workers.perform(one, tmp_path, tmp_path / 'runs', train=train)
  assert not one.file(tmp_path).exists()


def test_the_report_needs_the_files_only(tmp_path):
  with pytest.raises(UserError, match='no results'):
    run.write(EXPERIMENT, 'x', tmp_path, tmp_path, Console(quiet=True))
  walk(tmp_path, Trainer())
  run.write(EXPERIMENT, 'x', tmp_path, tmp_path, Console(quiet=True))
  page = (tmp_path / 'table.md').read_text()
  # Seeds add 0, 1 and 2 points: s = 1 point, half = 4.302653 / sqrt(3); the arms differ by 10.
  assert '| opd | 0.0005 | 3 | 25.0 | 61.0 ± 2.5 | – | 18.1 |' in page
  assert '| dopd | 0.001 | 3 | 25.0 | 51.0 ± 2.5 | -10.0 ± 0.0 | 18.1 |' in page
  # Tuning seeds add 100 and 101 points.
  assert '| opd | 0.0005 | 160.0 | 161.0 | 160.5 | yes |' in page
  assert '| opd | 0.001 | 155.0 | 156.0 | 155.5 |  |' in page
  assert (tmp_path / 'curves.png').stat().st_size > 10_000
  assert (tmp_path / 'finals.png').stat().st_size > 10_000


def test_other_metrics_stand_beside_it(tmp_path):
  experiment = dataclasses.replace(EXPERIMENT, also=('train/entropy/S',))
  made = [result('opd', 0, 0.5), result('opd', 1, 0.5)]
  for one, value in zip(made, (0.25, 0.75)):
    one['rows'][-1]['train/entropy/S'] = value
  (summary,) = results.summarise(experiment, made)
  assert summary.also['train/entropy/S'].mean == 0.5
  (table,) = tables.tables(experiment, made, [])
  assert 'entropy/S' in table.heads
  # t(0.975; 1) = 12.7062, s / sqrt(2) = .25.
  assert table.rows[0][table.heads.index('entropy/S')] == '0.5 ± 3.2'


def test_a_quick_run_is_small_and_does_not_tune(tmp_path):
  more = {'data.train': 'nowhere', 'objective.temperature': 2.0}
  experiment = dataclasses.replace(EXPERIMENT, changes=EXPERIMENT.changes | more)
  ran = walk(tmp_path, Trainer(), experiment, quick=True)
  assert [(c.objective.name, c.seed, c.steps) for c in ran] == [('opd', 0, 2), ('dopd', 0, 2)]
  assert all('size=64' in c.data.train and c.objective.temperature == 2.0 for c in ran)


def test_a_quick_run_of_all_has_one_run_a_file():
  """An arm of a pool may name the rate that another experiment finds by tuning."""
  files = {}
  for name, experiment in DECLARED.items():
    _, kept = run.folders(name, experiment, 'out', quick=True)
    for one in grid.final_runs(experiment, dict.fromkeys(experiment.arms), quick=True):
      assert files.setdefault(one.file(kept), one.config_hash) == one.config_hash
  assert len({file.parent.parent for file in files}) == len(DECLARED)


def test_a_quick_run_of_many_trains_a_config_once(tmp_path):
  arms = {**EXPERIMENT.arms, 'again': Arm('method=opd'), 'far': Arm('method=opd,seed=0')}
  both = {'one': EXPERIMENT, 'two': dataclasses.replace(EXPERIMENT, arms=arms)}
  planned = {
    name: grid.final_runs(e, dict.fromkeys(e.arms), quick=True) for name, e in both.items()
  }
  quick, trainer = tmp_path / 'quick', Trainer()

  def execute(todo):
    for one in todo:
      yield one, workers.perform(one, quick, tmp_path / 'runs', train=trainer)

  for _ in range(2):  # the second time all have a result
    into = run.once(planned, execute, quick, Console(quiet=True))
    assert [c.objective.name for c in trainer.ran] == ['opd', 'dopd']
  for name, experiment in both.items():
    kept, arms = tmp_path / name, list(experiment.arms)
    run.walk(experiment, arms, kept, into(kept, kept), Console(quiet=True), quick=True)
    found = results.read(experiment, kept, 'results')
    assert sorted(r['arm'] for r in found) == sorted(arms)
    method = lambda r: 'dopd' if r['arm'] == 'dopd' else 'opd'
    assert all(r['config']['objective']['name'] == method(r) for r in found)


# -------------------------------------------------------------------------------------- declaring


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'arms': {}}, 'at least one arm'),
    ({'arms': {'a/b': Arm()}}, 'letters, digits'),
    ({'tuning_seeds': ()}, 'go together'),
    ({'tuning_seeds': (2, 100)}, 'must all differ'),
  ],
)
def test_a_wrong_declaration(changes, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(EXPERIMENT, **changes)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'objective.kk': 5}, "arm 'opd': .*kk"),
    ({'objective.k': 'many'}, "arm 'opd': .*k"),
    ({'objective.k': -1}, "arm 'opd': .*k"),
    ({'nothing.k': 5}, "arm 'opd': .*nothing"),
  ],
)
def test_a_wrong_change_is_told_before_anything_runs(tmp_path, changes, words):
  trainer = Trainer()
  arms = {'dopd': Arm('method=dopd'), 'opd': Arm('method=opd', changes)}
  with pytest.raises(UserError, match=words):
    walk(tmp_path, trainer, dataclasses.replace(EXPERIMENT, arms=arms))
  assert trainer.ran == []


def test_no_tuning_sees_its_test_set():
  for experiment in DECLARED.values():
    sets = lambda config: {config.data.eval, *dict(config.data.evals).values()} - {''}
    final = grid.final_runs(experiment, dict.fromkeys(experiment.arms))
    tests = set().union(*(sets(r.config) for r in final))
    tuned = [
      *grid.tuning_runs(
        dataclasses.replace(experiment, learning_rates=experiment.learning_rates[:1]),
        list(experiment.arms),
      ),
      *models.wanted(experiment).values(),
    ]
    assert all(not tests & sets(r.config) for r in tuned)
    # The first records of a larger set are those of a smaller.
    assert not any('split=test' in s for r in tuned for s in sets(r.config) if experiment.pool)


@pytest.mark.parametrize('name', sorted(DECLARED))
def test_a_quick_run_of_every_declared_experiment_is_valid(name):
  runs = grid.final_runs(DECLARED[name], dict.fromkeys(DECLARED[name].arms), quick=True)
  assert [r.arm for r in runs] == list(DECLARED[name].arms)
  assert all(r.config.steps <= grid.QUICK for r in runs)
  sources = [source for r in runs for source in (r.config.data.train, r.config.data.eval) if source]
  assert all(int(re.search(r'size=(\d+)', source)[1]) <= 64 for source in sources)
  assert all(r.config.rollout.prompts * r.config.rollout.samples <= 16 for r in runs)


def test_the_data_of_the_study_are_there_and_as_they_say():
  """The share of problems with two chains is rho, to four standard deviations."""
  sources = {
    source
    for e in DECLARED.values()
    if e.pool in (study.TEXT, study.EXPLORATORY)
    for r in grid.final_runs(e, dict.fromkeys(e.arms))
    if r.seed == 0
    for source in (r.config.data.train, *dict(r.config.data.stages), r.config.data.eval)
    if 'rho=' in source  # not those of reasoning_gym
  }
  sources = {re.sub('hint=[a-z_]+', 'hint=steps', source) for source in sources}
  assert len(sources) > 5
  for source in sorted(sources):
    rho = float(re.search('rho=([0-9.]+)', source)[1])
    found = [bool(record['other_route']) for record in tasks.load(source.removeprefix('task:'))]
    assert abs(sum(found) / len(found) - rho) <= 4 * (rho * (1 - rho) / len(found)) ** 0.5, source


def test_models_are_made_where_they_are_missing(tmp_path, monkeypatch):
  exported = []

  def export(workdir, path):
    exported.append(path)
    pathlib.Path(path).mkdir()

  monkeypatch.setattr(models.export, 'export', export)
  trainer = Trainer()

  def into(out, runs):
    return lambda todo: ((one, workers.perform(one, out, runs, train=trainer)) for one in todo)

  made = {
    'teacher': 'configs/quickstart.py:method=opd',
    'student': 'configs/quickstart.py:method=opd,seed={seed}',
  }
  experiment = dataclasses.replace(EXPERIMENT, models=made, seeds=(0, 2))
  prepare = lambda experiment=experiment: models.prepare(
    experiment, into, Console(quiet=True), tmp_path
  )
  prepare()
  names = [pathlib.Path(path).name for path in exported]
  assert names == ['teacher', 'student_100', 'student_101', 'student_0', 'student_2']
  assert [c.seed for c in trainer.ran] == [0, 100, 101, 0, 2]
  prepare()
  assert len(exported) == 5 == len(trainer.ran)  # all there: nothing is made again
  (tmp_path / 'student_2').rmdir()
  prepare()
  assert exported[5:] == [str(tmp_path / 'student_2')] and len(trainer.ran) == 5

  other = {'teacher': 'configs/quickstart.py:method=dopd'}
  with pytest.raises(UserError, match='is the result of another config'):
    prepare(dataclasses.replace(experiment, models=other))


def test_a_model_that_did_not_become_what_it_should_is_an_error(tmp_path, monkeypatch):
  """A student below its accuracy, or a training whose loss broke, is never exported."""
  monkeypatch.setattr(models.export, 'export', lambda *_: pytest.fail('exported'))
  config = grid.make_config(EXPERIMENT, 'opd', 0)
  config = dataclasses.replace(
    config, evaluation=dataclasses.replace(config.evaluation, stop_at=0.9, every=2)
  )
  monkeypatch.setattr(models, 'wanted', lambda _: {pathlib.Path('m'): grid.Run('m', 0, config)})
  for breaks, words in (
    (False, r'^m was to reach 90% and ended at 60\.0%: give it more steps$'),
    (True, '^m could not be trained: the loss is not finite'),
  ):
    trainer = Trainer(lambda _, breaks=breaks: breaks)
    into = lambda out, runs, trainer=trainer: (
      lambda todo: ((one, workers.perform(one, out, runs, train=trainer)) for one in todo)
    )
    with pytest.raises(UserError, match=words):
      models.prepare(EXPERIMENT, into, Console(quiet=True), tmp_path / str(breaks))
