"""What the commands of experiments share: whose code, whose models, how they end, a bar."""

import contextlib
import hashlib
import pathlib
import signal
import subprocess

import jax
from rich import progress
from rich.console import Console

from dopd_jax.config import Config
from experiments.grid import ROOT


def commit() -> str:
  """The commit of the code, with `-dirty` behind it where files differ; '' without git."""
  # A grid that writes its results must not wait for, or take, the index of the user's git.
  words = ['git', '--no-optional-locks', 'describe', '--always', '--dirty', '--abbrev=40']
  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    told = subprocess.run(
      [*words, '--exclude=*'], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return told.stdout.strip()
  return ''


def weights(config: Config) -> dict[str, str]:
  """Path -> SHA-256 of its weights, in hexadecimal; of student and teacher that lie in a folder."""
  found = {}
  for path in filter(None, (config.student.path, config.teacher.path)):
    if files := sorted(pathlib.Path(path).glob('*.safetensors')):
      found[path] = hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()
  return found


def end_by_interrupt() -> None:
  """Makes SIGTERM what Ctrl-C is, so that runs save their state before the command ends."""

  def interrupt(*_):
    raise KeyboardInterrupt

  signal.signal(signal.SIGTERM, interrupt)


def fast_compilation() -> dict[str, str]:
  """Environment for processes that compile more than they compute: fast rather than well."""
  flags = '--xla_cpu_parallel_codegen_split_count=1'
  if jax.__version_info__ < (0, 11):  # a flag that XLA doesn't know ends the process without a word
    flags += ' --xla_cpu_use_fusion_emitters=false'
  return {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'XLA_FLAGS': flags}


def bar(console: Console) -> progress.Progress:
  """Of items that take from seconds to minutes each."""
  return progress.Progress(
    progress.TextColumn('{task.description}'),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeElapsedColumn(),
    progress.TextColumn('left'),
    progress.TimeRemainingColumn(),
    console=console,
    speed_estimate_period=1e9,  # all of them tell the speed
  )
