"""Training the runs of a grid: one run from config to result file, and the processes for many."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from dopd_jax import cli, report, workdirs
from dopd_jax import train as trainer
from dopd_jax.errors import Stopped, UserError
from experiments import common
from experiments.grid import Run

Execute = Callable[[Sequence[Run]], Iterable[tuple[Run, dict[str, Any]]]]
Into = Callable[[pathlib.Path, pathlib.Path], Execute]  # of results, of workdirs


class Cut(Exception):
  """A run was told to stop by a signal; it goes on from its workdir."""


def perform(
  run: Run,
  out: pathlib.Path,
  runs: pathlib.Path,
  commit: str = '',
  console: Console | None = None,
  train: Callable[..., Any] = trainer.train,
) -> dict[str, Any]:
  """Trains, or goes on training, and writes the run's result; returns it.

  Raises:
    Cut: it was stopped by a signal.
    UserError: as `train` raises it, or the result cannot be written.
  """
  workdir = run.workdir(runs)
  models = _begun_with(run, workdir)
  stopped = ''
  try:
    train(run.config, str(workdir), console)
  except Stopped as error:
    stopped = str(error)
  rows = report.read_metrics(workdir / 'metrics.jsonl')
  early = trainer.reached(run.config, rows[-1])
  if not (stopped or early) and rows[-1]['step'] < run.config.steps:
    raise Cut(run.name)
  about = json.loads((workdir / 'config.json').read_text())
  result = {
    'arm': run.arm,
    'seed': run.seed,
    'learning_rate': run.learning_rate,
    **({'stopped': stopped} if stopped else {}),
    'commit': commit,
    'versions': about['versions'],
    'device': about['device'],
    **({'models': models} if models else {}),
    # Of training and measuring, over all parts of a run that was cut off; without loading.
    'wall_seconds': sum(
      value for row in rows for name, value in row.items() if value and _is_seconds(name)
    ),
    'config': about['config'],
    'means': means(rows),
    **({'judged': judged} if (judged := judged_last(workdir)) else {}),
    'rows': [row for row in rows if any(name.startswith('eval/') for name in row)],
  }
  # The config as it is: it says whether a run that is asked for has its result.
  result = {key: value if key == 'config' else rounded(value) for key, value in result.items()}
  write(result, run.file(out))
  return result


def write(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """As JSON with a line a key, and one a row; raises `UserError` if it cannot be written."""
  parts = {key: json.dumps(value) for key, value in result.items()}
  parts['rows'] = '[\n  ' + ',\n  '.join(map(json.dumps, result['rows'])) + '\n]'
  with workdirs.writing(str(path)) as file:
    file.write('{\n' + ',\n'.join(f'"{key}": {text}' for key, text in parts.items()) + '\n}\n')


def _begun_with(run: Run, workdir: pathlib.Path) -> dict[str, str]:
  """The models' digests, which a run that goes on must find as it began."""
  found = common.weights(run.config)
  kept = workdir / 'models.json'
  if found and kept.exists() and json.loads(kept.read_text()) != found:
    raise UserError(f'{workdir} began with other models: bring them back, or delete it')
  if found:
    with workdirs.writing(str(kept)) as file:
      json.dump(found, file)
  return found


def judged_last(workdir: pathlib.Path) -> str:
  """What the student has right at the last look, 0 or 1 a held-out record, in their order.

  Empty where there is none, or a reward between 0 and 1.
  """
  files = sorted((workdir / 'judged').glob('*.json'))
  rewards = list(json.loads(files[-1].read_text()).values()) if files else []
  return ''.join(f'{int(r)}' for r in rewards) if set(rewards) <= {0.0, 1.0} else ''


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Of each train/ metric the mean over the steps that have it, of each time/ metric the median."""
  found: dict[str, float] = {}
  for name in sorted({name for row in rows for name in row}):
    values = report.series(rows, name)[1]
    values = values[np.isfinite(values)]
    if len(values) and name.startswith('train/'):
      found[name] = float(values.mean())
    elif len(values) and name.startswith('time/'):  # the first step compiles
      found[name] = float(np.median(values))
  return found


def rounded(node: Any) -> Any:
  """Every float of a JSON document to six significant digits."""
  if isinstance(node, dict):
    return {key: rounded(value) for key, value in node.items()}
  if isinstance(node, list | tuple):
    return [rounded(value) for value in node]
  return float(f'{node:.6g}') if isinstance(node, float) else node


def _is_seconds(name: str) -> bool:
  return name.startswith('time/') and name.endswith('_seconds')


# ----------------------------------------------------------------------------------- the processes


class Processes:
  """Trains runs in processes, each with its share of the cores: one where there is one each.

  They start where there is a run for them, and stay for those to come. A run has the same share
  however many wait beside it, on a machine of as many cores and with the same `count`: on more
  cores it rounds otherwise, and a model that is made again would be another. On leaving the
  context, or the runs before their end, they end; a run that is under way saves its state first.

  Args:
    count: of processes at most, among which the cores are dealt.
    commit: the code's.
  """

  def __init__(self, count: int, commit: str):
    self._count = count
    self._commit = commit
    self._workers: list[Worker] = []

  def __enter__(self) -> 'Processes':
    return self

  def __exit__(self, *_) -> None:
    self._end()

  def _end(self) -> None:
    for worker in self._workers:
      worker.end()
    for worker in self._workers:
      worker.join()
    self._workers = []

  def into(self, out: pathlib.Path, runs: pathlib.Path) -> Execute:
    """What trains runs with their results below `out` and their workdirs below `runs`."""

    def execute(todo: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
      waiting = list(reversed(todo))
      wanted = min(self._count, len(waiting))
      try:
        for cores in shares(_cores(), self._count)[len(self._workers) : wanted]:
          self._workers.append(Worker(cores, self._commit))
        for worker in self._workers[:wanted]:
          worker.give(waiting.pop(), out, runs)
        while busy := {worker.pipe: worker for worker in self._workers if worker.run}:
          for pipe in multiprocessing.connection.wait(busy):
            worker = busy[pipe]
            ended = worker.take()
            if waiting:
              worker.give(waiting.pop(), out, runs)
            yield ended
      except Cut:
        raise KeyboardInterrupt from None
      finally:
        if any(worker.run for worker in self._workers):
          self._end()

    return execute


class Worker:
  """A process that takes one run after another; it ends when the command does.

  Args:
    cores: that it keeps to; all if empty.
    commit: the code's.
  """

  def __init__(self, cores: Sequence[int], commit: str):
    # Nothing is shared between workers: one that is killed can hold no lock of another.
    spawn = multiprocessing.get_context('spawn')
    self.pipe, theirs = spawn.Pipe()
    self._process = spawn.Process(target=_work, args=(theirs, cores, commit))
    self._process.start()
    theirs.close()
    self.run: Run | None = None

  def give(self, run: Run, out: pathlib.Path, runs: pathlib.Path) -> None:
    """Begins a run."""
    self.run = run
    with contextlib.suppress(ConnectionError):  # it was killed: `take` tells
      self.pipe.send((run, out, runs))

  def take(self) -> tuple[Run, dict[str, Any]]:
    """The run that has ended, and its result; raises what it raised."""
    assert self.run
    try:
      answer = self.pipe.recv()
    except (EOFError, ConnectionError) as error:
      raise UserError(
        f'the process of {self.run.name} was killed, perhaps for its memory: give the same command '
        'again, with a smaller --jobs'
      ) from error
    if isinstance(answer, Exception):
      raise answer
    ended, self.run = self.run, None
    return ended, answer

  def end(self) -> None:
    """Asks a run to save its state and end; `join` waits for it."""
    self.pipe.close()
    if self.run is not None:
      self._process.terminate()

  def join(self) -> None:
    """Waits until the process is gone."""
    self._process.join()


def shares(cores: Sequence[int], count: int) -> list[Sequence[int]]:
  """As many cores for each of `count` processes; where they are more than cores, some share one."""
  each = max(len(cores) // count, 1)
  starts = (i * each % len(cores) if cores else 0 for i in range(count))
  return [cores[start : start + each] for start in starts]


def _cores() -> list[int]:
  # Not every system can tell them.
  return sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []


def _work(pipe: Any, cores: Sequence[int], commit: str) -> None:
  """What a worker does."""
  if cores:  # before JAX asks how many there are
    os.sched_setaffinity(0, cores)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which ends its own
  threading.Thread(target=_end_with_parent, daemon=True).start()
  cli.keep_compilations()
  with contextlib.suppress(EOFError, ConnectionError):  # no more runs, or the command is gone
    while True:
      run, out, runs = pipe.recv()
      try:
        answer: Any = _logged(run, out, runs, commit)
      except (UserError, Cut) as error:
        answer = error
      except Exception:  # ours, or a library's that may not travel: its words do
        answer = RuntimeError(f'{run.name} failed:\n{traceback.format_exc()}')
      pipe.send(answer)


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent
  parent.join()
  os.kill(os.getpid(), signal.SIGTERM)


def _logged(run: Run, out: pathlib.Path, runs: pathlib.Path, commit: str) -> dict[str, Any]:
  """`perform` with everything that is printed going to `train.log` in the workdir."""
  workdir = run.workdir(runs)
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / 'train.log', 'a') as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    return perform(run, out, runs, commit, Console(file=log, width=120))
