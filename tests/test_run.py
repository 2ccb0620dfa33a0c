"""The command of the experiments: its flags, its processes, what it says of mistakes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dopd_jax.errors import UserError
from experiments import grid, run, workers

ROOT = pathlib.Path(__file__).parent.parent


def test_a_flag_leaves_of_each_experiment_what_it_has():
  known = {'a': [0, 1, 10], 'b': [0]}
  assert run.chosen('seeds', [], known) == known
  assert run.chosen('seeds', ['1', '10'], known) == {'a': [1, 10], 'b': []}
  with pytest.raises(UserError, match="unknown seed in --seeds '2'"):
    run.chosen('seeds', ['0', '2'], known)


def test_processes_share_the_cores():
  assert workers.shares([0, 1, 4], 1) == [[0, 1, 4]]
  assert workers.shares([0, 1, 4], 2) == [[0, 4], [1]]
  assert workers.shares([3, 5], 2) == [[3], [5]]
  assert workers.shares([3, 5], 3) == [[3], [5], [3]]
  assert workers.shares([], 2) == [(), ()]


def test_all_begins_with_what_was_named_beforehand():
  names = grid.names()
  assert sorted(names) == sorted(p.parent.name for p in ROOT.glob('experiments/*/experiment.py'))
  primary = [bool(grid.load(name).contrasts) for name in names]
  assert sum(primary) == 2 and all(primary[:2])


def command(*args, code=0):
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1', 'COLUMNS': '160'}
  words = [sys.executable, '-m', 'experiments.run', *map(str, args)]
  done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
  return done


def test_a_mistake_on_the_command_line_is_one_sentence():
  told = command('methods', '--arms=opd,dopdd', code=2).stderr.strip()
  assert told.startswith('error: ') and '\n' not in told
  assert "unknown arm in --arms 'dopdd': did you mean 'dopd'?" in told


def test_an_experiment_that_is_not_there(monkeypatch):
  with pytest.raises(UserError, match="unknown experiment 'method': did you mean 'methods'"):
    grid.load('method')
  monkeypatch.setattr(run, '_NAME', '', raising=False)
  with pytest.raises(UserError, match='name an experiment first'):
    run.main()


def test_one_run_has_all_cores_however_many_processes_are_allowed(tmp_path, monkeypatch):
  given = []

  def start(cores, *_):
    given.append(list(cores))
    raise KeyboardInterrupt  # before anything starts

  monkeypatch.setattr(workers, 'Worker', start)
  monkeypatch.setattr(workers, '_cores', lambda: [0, 1, 4])
  with pytest.raises(KeyboardInterrupt):
    list(workers.in_processes(8, tmp_path, tmp_path, '')(['a run']))
  assert given == [[0, 1, 4]]


FOLDER = """
from experiments.grid import Arm, Experiment

EXPERIMENT = Experiment(
  question='Which?',
  base='configs/quickstart.py',
  arms={
    'opd': Arm('method=opd'),
    'dopd': Arm('method=dopd', {'objective.k': 5}),
    'broken': Arm('method=opd', {'student.path': 'nowhere'}),
  },
)
"""


@pytest.mark.slow
def test_the_command_runs_goes_on_and_tells_a_mistake_of_a_run(tmp_path):
  (tmp_path / 'small').mkdir()
  (tmp_path / 'small' / 'experiment.py').write_text(FOLDER)
  out = tmp_path / 'out' / 'small'
  args = (tmp_path / 'small', '--quick', f'--out={tmp_path / "out"}', '--jobs=2')
  told = command(*args, '--arms=opd,dopd').stdout
  assert 'opd.seed0: ' in told and 'dopd.seed0: ' in told
  finals = [json.loads(p.read_text()) for p in sorted((out / 'results').glob('*.json'))]
  assert [r['arm'] for r in finals] == ['dopd', 'opd']
  assert finals[0]['config']['objective']['k'] == 5
  assert all(r['rows'][-1]['step'] == 2 and r['device'] for r in finals)
  page = (out / 'table.md').read_text()
  assert '| dopd | 0.0005 | 1 |' in page and 'Not run yet: broken.' in page
  assert (out / 'curves.png').exists()

  (out / 'results' / 'dopd.seed0.json').unlink()
  told = command(*args, '--arms=opd,dopd').stdout
  assert 'dopd.seed0: ' in told and '\nopd.seed0: ' not in f'\n{told}'
  told = command(*args, code=2).stderr.strip()
  assert told.startswith('error: ') and 'nowhere' in told and '\n' not in told
