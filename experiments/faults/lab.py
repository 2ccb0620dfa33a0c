"""Where faults are tried: the training command as a process, an unbroken run, and comparisons.

Every run is `python -m dopd_jax.train` on the pair of the quickstart, with few and short prompts,
a save every second step, and a folder of its own for compiled programs.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dopd_jax import report, tasks
from dopd_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
TRAIN = (sys.executable, '-m', 'dopd_jax.train')
STEPS, EVERY = 24, 2
PATIENCE = 600  # seconds until a run that says nothing is taken for a hang
SETTINGS = {
  'steps': STEPS,
  'checkpoint.every': EVERY,
  'evaluation.every': 8,
  'evaluation.teacher': False,
  'log.tensorboard': False,
  'log.samples': 4,
}


class Trial(NamedTuple):
  """One injection: what was done, what was seen, and whether that was the expected."""

  what: str
  seen: str
  ok: bool
  facts: dict[str, Any] = {}  # noqa: RUF012  (numbers for the result file)


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault of the table.

  Attributes:
    name: of its result file.
    injected: what is done, in words.
    expected: what must be seen, in words.
    trials: makes its injections one after the other, from the given number on.
    count: how many those are.
  """

  name: str
  injected: str
  expected: str
  trials: Callable[['Lab', int], Iterator[Trial]]
  count: int


class Ended(NamedTuple):
  """How a run ended."""

  code: int
  log: str

  @property
  def sentence(self) -> str:
    """The last line of a run that failed; a traceback instead of a sentence is no good end."""
    return self.log.strip().splitlines()[-1] if self.log.strip() else ''

  def told(self, *words: str, code: int = 2) -> bool:
    """Whether it ended with this code and one sentence that holds the words."""
    start = 'error: ' if code == 2 else 'stopped: '
    return (
      self.code == code
      and self.sentence.startswith(start)
      and all(word in self.sentence for word in words)
      and 'Traceback' not in self.log
    )


class Lab:
  """A folder with data, an unbroken run for each set of settings, and the runs of trials."""

  def __init__(self, root: pathlib.Path, seed: str):
    self.root = root
    self.random = random.Random(seed)
    self.train, self.eval = root / 'train.jsonl', root / 'eval.jsonl'
    write(self.train, records(64, 1000))
    write(self.eval, records(16, 8, split='test'))
    self._unbroken: dict[str, pathlib.Path] = {}

  def flags(self, workdir: pathlib.Path, method: str = 'dopd', **changes: Any) -> list[str]:
    """Of the training command; in names of `changes` `__` is the dot."""
    values = SETTINGS | {'data.train': self.train, 'data.eval': self.eval}
    values |= {name.replace('__', '.'): value for name, value in changes.items()}
    given = [f'--config.{name}={value}' for name, value in values.items()]
    return [
      f'--config={ROOT}/configs/quickstart.py:smoke,method={method}',
      f'--workdir={workdir}',
      *given,
    ]

  def start(
    self,
    workdir: pathlib.Path,
    *,
    inside: Sequence[str] = (),
    program: Sequence[str] = ('dopd_jax.train',),
    **changes: Any,
  ) -> 'Process':
    """Starts the command, or `program` with its flags, behind the words `inside`."""
    words = [*inside, sys.executable, '-m', *program, *self.flags(workdir, **changes)]
    return Process(words, self.root)

  def start_both(self, workdir: pathlib.Path) -> list['Process']:
    """Starts the command as two processes of one run, each with a device."""
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{free.getsockname()[1]}'
    known = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_COORDINATOR_BIND_ADDRESS': address}
    known |= {'JAX_NUM_PROCESSES': '2', 'DOPD_JAX_HEARTBEAT_SECONDS': '30'}
    words = [*TRAIN, *self.flags(workdir)]
    return [Process(words, self.root, {**known, 'JAX_PROCESS_ID': str(i)}, str(i)) for i in (0, 1)]

  def run(self, workdir: pathlib.Path, **options: Any) -> Ended:
    """Starts the command and waits."""
    return self.start(workdir, **options).end()

  def unbroken(self, **changes: Any) -> pathlib.Path:
    """The workdir of a run that nothing happened to, with all of its checkpoints."""
    key = json.dumps({k: str(v) for k, v in changes.items()}, sort_keys=True)
    if key not in self._unbroken:
      workdir = self.root / f'unbroken{len(self._unbroken)}'
      ended = self.run(workdir, checkpoint__keep=1000, **changes)
      if ended.code:
        raise UserError(f'the unbroken run failed: {ended.sentence}')
      self._unbroken[key] = workdir
    return self._unbroken[key]

  def cut_off(self, name: str, step: int, **changes: Any) -> pathlib.Path:
    """A copy of the unbroken run as it was after `step`."""
    source, workdir = self.unbroken(**changes), self.fresh(name)
    shutil.copytree(source, workdir)
    for saved in (workdir / 'checkpoints').iterdir():
      if int(saved.name) > step:
        shutil.rmtree(saved)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)['step'] <= step]
    (workdir / 'metrics.jsonl').write_text(''.join(kept))
    return workdir

  def fresh(self, name: str) -> pathlib.Path:
    """The path of a workdir that is not there."""
    path = self.root / name
    shutil.rmtree(path, ignore_errors=True)
    return path

  def same(self, workdir: pathlib.Path, to: int = STEPS, **changes: Any) -> bool:
    """Whether the rows up to step `to` are those of the unbroken run, times aside."""
    wanted = [row for row in rows(self.unbroken(**changes)) if row['step'] <= to]
    return rows(workdir) == wanted


class Tail:
  """The end of a file of rows that grows."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def last_step(self) -> int:
    """The step of its last whole row, -1 without any."""
    if not self._path.exists():
      return -1
    with self._path.open('rb') as file:
      file.seek(max(self._path.stat().st_size - 16_384, 0))
      lines = file.read().split(b'\n')[:-1]
    return json.loads(lines[-1])['step'] if lines else -1


class Process:
  """A command that runs; what it prints goes to a file, so that it never waits for a reader."""

  def __init__(
    self,
    words: Sequence[str],
    root: pathlib.Path,
    env: Mapping[str, str] = types.MappingProxyType({}),
    name: str = '',
  ):
    own = {
      'JAX_PLATFORMS': 'cpu',
      'HF_HUB_OFFLINE': '1',
      'PYTHONPATH': str(ROOT),
      # A kill may hit the compiler's cache as well: it must not be the user's.
      'JAX_COMPILATION_CACHE_DIR': str(root / 'xla'),
    }
    self._log = root / f'log{name}.txt'
    with self._log.open('w') as log:
      self._process = subprocess.Popen(
        ['nice', *words], cwd=ROOT, env={**os.environ, **own, **env}, stdout=log, stderr=log
      )

  def wait_for(self, condition: Callable[[], bool]) -> None:
    """Returns when the condition holds or the process has ended."""
    end = time.monotonic() + PATIENCE
    while self.running() and not condition():
      if time.monotonic() > end:
        self.signal(signal.SIGKILL)
        raise UserError(f'a run said nothing for {PATIENCE} s: {self.end().sentence}')
      time.sleep(0.002)

  @property
  def pid(self) -> int:
    """Its number."""
    return self._process.pid

  def running(self) -> bool:
    """Whether it has not ended."""
    return self._process.poll() is None

  def signal(self, number: int) -> None:
    """Sends a signal; none to a process that has ended."""
    self._process.send_signal(number)

  def end(self) -> Ended:
    """Waits for the end."""
    try:
      code = self._process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
      self._process.kill()
      code = self._process.wait()
    return Ended(code, self._log.read_text(errors='replace'))


def records(count: int, seed: int, **options: Any) -> list[dict[str, Any]]:
  """Records of the quickstart's task, as lines of a file."""
  made = tasks.make_records(
    'plan_execute', count, seed, steps=2, definitions=4, modulus=7, **options
  )
  keep = ('id', 'prompt', 'privileged_context', 'verifier', 'answer')
  return [{key: record[key] for key in keep} for record in made]


def write(path: pathlib.Path, lines: Sequence[dict[str, Any]]) -> None:
  """A JSONL file."""
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of `metrics.jsonl` without their times; none where there is no file yet."""
  path = workdir / 'metrics.jsonl'
  found = report.read_metrics(path) if path.exists() else []
  return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in found]


def step_seconds(workdir: pathlib.Path) -> list[float]:
  """What the log says of the time of each step."""
  found = report.read_metrics(workdir / 'metrics.jsonl')
  return [row['time/step_seconds'] for row in found if 'time/step_seconds' in row]


def last_row(workdir: pathlib.Path) -> int:
  """The step of the last row, -1 without any."""
  found = rows(workdir)  # once: a run that starts anew empties the file
  return found[-1]['step'] if found else -1


def saved(workdir: pathlib.Path) -> list[int]:
  """Steps of the checkpoints with a manifest."""
  found = workdir.glob('checkpoints/*/manifest.json')
  return sorted(int(path.parent.name) for path in found)


def saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written: a directory without a manifest."""
  found = workdir.glob('checkpoints/*')
  return any(not (path / 'manifest.json').exists() for path in found)


def digest(directory: pathlib.Path) -> str:
  """A hash of all names and contents below a directory."""
  whole = hashlib.sha256()
  for path in sorted(directory.rglob('*')):
    whole.update(f'{path.relative_to(directory)}\0'.encode())
    if path.is_file():
      whole.update(path.read_bytes())
  return whole.hexdigest()
