"""The command of the experiments: its flags, its processes, what it says of mistakes."""

import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
from typing import ClassVar

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
  assert workers.shares([0, 1, 4], 2) == [[0], [1]]  # a run has the same share in either
  assert workers.shares([0, 1, 4, 5], 2) == [[0, 1], [4, 5]]
  assert workers.shares([3, 5], 2) == [[3], [5]]
  assert workers.shares([3, 5], 3) == [[3], [5], [3]]
  assert workers.shares([], 2) == [[], []]


def test_all_begins_with_what_was_named_beforehand():
  names = grid.names()
  assert sorted(names) == sorted(p.parent.name for p in ROOT.glob('experiments/*/experiment.py'))
  assert names[:3] == ['image_contrasts', 'teachers', 'text']
  assert [bool(grid.load(name).contrasts) for name in names] == [True] * 3 + [False] * len(
    names[3:]
  )


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


class Worker:
  """Stands for a process; it ends its run as soon as it is given."""

  started: ClassVar[list] = []

  def __init__(self, cores, commit):
    self.started.append(self)
    self.cores, self.run, self.given, self.ended = list(cores), None, [], False
    self.pipe, self.theirs = multiprocessing.Pipe()

  def give(self, run, out, runs):
    assert not self.ended
    self.run = (run, out, runs)
    self.given.append(run)
    self.theirs.send(run)

  def take(self):
    self.pipe.recv()
    run, self.run = self.run, None
    return run, {}

  def end(self):
    self.ended = True

  def join(self):
    assert self.ended


@pytest.fixture
def started(monkeypatch):
  monkeypatch.setattr(workers, 'Worker', Worker)
  monkeypatch.setattr(workers, '_cores', lambda: [0, 1, 4])
  monkeypatch.setattr(Worker, 'started', [])
  return Worker.started


def test_processes_stay_for_the_next_runs_and_each_keeps_its_share(started):
  """A model that is made again alone is the one that was made beside others."""
  with workers.Processes(2, '') as processes:
    one = list(processes.into('x', 'y')(['a']))
    assert [w.cores for w in started] == [[0]]
    assert list(processes.into('x', 'y')([])) == []
    three = list(processes.into('v', 'w')(['b', 'c', 'd']))
    two = list(processes.into('x', 'y')(['e', 'f']))
    last = list(processes.into('x', 'y')(['g']))
    assert [w.cores for w in started] == [[0], [1]]  # nothing started anew
    assert sorted(run for w in started for run in w.given) == list('abcdefg')
  assert [run for run, _ in one + last] == [('a', 'x', 'y'), ('g', 'x', 'y')]
  assert sorted(run for run, _ in three) == [(name, 'v', 'w') for name in 'bcd']
  assert sorted(run for run, _ in two) == [(name, 'x', 'y') for name in 'ef']
  assert all(worker.ended for worker in started)


def test_runs_that_are_not_waited_for_leave_no_process_behind(started):
  """Those to come would be told the result of another run."""
  with workers.Processes(2, '') as processes:
    abandoned = iter(processes.into('x', 'y')(['a', 'b', 'c']))
    next(abandoned)
    abandoned.close()
    assert len(started) == 2 and all(worker.ended for worker in started)
    then = list(processes.into('x', 'y')(['d', 'e']))
  assert sorted(run for run, _ in then) == [('d', 'x', 'y'), ('e', 'x', 'y')]


def test_an_interrupt_while_processes_start_ends_those_that_have(started, monkeypatch):
  def start(cores, commit):
    if started:
      raise KeyboardInterrupt
    return Worker(cores, commit)

  monkeypatch.setattr(workers, 'Worker', start)
  with pytest.raises(KeyboardInterrupt), workers.Processes(2, '') as processes:
    list(processes.into('x', 'y')(['a', 'b']))
  assert len(started) == 1 and started[0].ended


def test_a_process_that_was_killed_between_runs_is_told_of_in_a_sentence(tmp_path):
  there = workers.Worker([], '')
  there._process.kill()
  there.join()
  there.give(grid.Run('opd', 0, None), tmp_path, tmp_path)
  with pytest.raises(UserError, match=r'^the process of opd\.seed0 was killed, perhaps for its'):
    there.take()


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
  (tmp_path / 'out' / '.quick' / 'results' / 'small.dopd.seed0.json').unlink()
  told = command(*args, '--arms=opd,dopd').stdout
  assert 'dopd.seed0: ' in told and '\nopd.seed0: ' not in f'\n{told}'
  told = command(*args, code=2).stderr.strip()
  assert told.startswith('error: ') and 'nowhere' in told and '\n' not in told
