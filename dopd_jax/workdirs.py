"""A workdir: whose run it is, how it is told to stop, and the pages that it ends with."""

import contextlib
import json
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, TextIO

import jax
from absl import logging
from jax.experimental import multihost_utils
from rich.console import Console

from dopd_jax import __version__, report, samples
from dopd_jax import config as configs
from dopd_jax.config import Config
from dopd_jax.errors import UserError
from dopd_jax.objectives import Objective


def check(workdir: str, config: Config) -> None:
  """Raises `UserError` if the workdir is the run of another config. Writes nothing.

  Logging, the cadence of evaluation and checkpoints, and what decides memory alone may differ from
  the run that began there: who ran out of memory must be able to go on.
  """
  path = os.path.join(workdir, 'config.json')
  if not os.path.exists(path):
    return
  try:
    with open(path) as file:
      old = dict(json.load(file)['config'])
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f'{path} is not the config of a run: choose another workdir') from error
  new = json.loads(configs.to_json(config))
  changed = configs.differences(old, new, (*configs.CADENCE, *configs.MEMORY))
  if memory := configs.differences(old, new) if not changed else []:
    logging.info('Rounding may differ from here on, with other %s.', '; '.join(memory))
  if changed:
    raise UserError(
      f'workdir {workdir} belongs to another config, which differs in {"; ".join(changed[:5])}: '
      'choose another workdir, or the settings that it began with'
    )


def claim(workdir: str, config: Config) -> None:
  """Makes the workdir and writes `config.json` into it, once everything else is known to be right.

  Raises:
    UserError: it can't be written.
  """
  if jax.process_index():
    return
  path = os.path.join(workdir, 'config.json')
  new = json.loads(configs.to_json(config))
  try:
    os.makedirs(workdir, exist_ok=True)
    about = {'config': new, 'versions': versions(), 'device': jax.devices()[0].device_kind}
    with open(f'{path}.partial', 'w') as file:
      json.dump(about, file, indent=2)
    os.replace(f'{path}.partial', path)
  except OSError as error:
    raise UserError(
      f'workdir {workdir} cannot be written ({error.strerror}): choose another or make room'
    ) from error


def read_config(workdir: str) -> Config:
  """The config that a workdir ran with; raises `UserError` if there is none."""
  path = os.path.join(workdir, 'config.json')
  try:
    with open(path) as file:
      values: Any = dict(json.load(file)['config'])
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f'there is no run in {workdir}: give the workdir of one') from error
  return configs.validate(values)


def check_rows(config: Config, objective: Objective, mesh: jax.sharding.Mesh) -> None:
  """Raises `UserError` unless the mesh divides the prompts and the rows of a micro-batch."""
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  numbers = [
    ('rollout.prompts', config.rollout.prompts),
    ('rollout.prompts_at_once', config.rollout.prompts_at_once),
  ]
  for rows in configs.rows_of_batches(config, objective):
    share = rows // objective.updates
    passes = configs.micro_batches(share, config.microbatch)
    numbers.append(('microbatch', share // passes))
  for name, rows in numbers:
    if rows % shards:
      raise UserError(
        f'{name} ({rows}) must be a multiple of the {shards} shards of mesh.data * mesh.fsdp: '
        f'{-(-rows // shards) * shards} would do'
      )


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
  """Whether the run saves and ends at a step, since SIGTERM came; to be asked at every step.

  Several processes end at the same step, wherever the signal came: jax catches it and agrees on it.
  """
  event = threading.Event()
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False
    return
  before = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield lambda step: event.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)


def write_judged(workdir: str, step: int, ids: Sequence[str], rewards: Any) -> None:
  """`judged/STEP.json`: what the verifier said of each held-out record at a look."""
  if jax.process_index():
    return
  with writing(os.path.join(workdir, 'judged', f'{step:08d}.json')) as file:
    json.dump(dict(zip(ids, map(float, rewards), strict=True)), file)


def write_pages(workdir: str, console: Console, page: Sequence[dict], method: str) -> None:
  """The table at the end, report.png, and samples.html if there is something to show."""
  source = os.path.join(workdir, 'metrics.jsonl')
  rows = report.read_metrics(source)
  console.print(report.summary_table(rows, title=f'{method}: {workdir}'))
  written = [report.write_report(source, os.path.join(workdir, 'report.png'), title=method)]
  if page:
    last = rows[-1]
    thresholds = {
      name: last[f'train/{name}'] for name in samples.THRESHOLDS if f'train/{name}' in last
    }
    path = os.path.join(workdir, 'samples.html')
    written.append(samples.write_samples(page, path, thresholds=thresholds, title=method))
  for path in written:
    logging.info('Wrote %s', path)


@contextlib.contextmanager
def writing(path: str) -> Iterator[TextIO]:
  """A text file that appears only once it is whole; raises `UserError` if it cannot."""
  partial = f'{path}.partial'
  try:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(partial, 'w') as file:
      yield file
    os.replace(partial, path)
  except OSError as error:
    raise UserError(
      f'{path} cannot be written ({error.strerror}): make room or choose another'
    ) from error
  finally:
    if os.path.exists(partial):
      os.unlink(partial)


def versions() -> dict[str, str]:
  """Of the packages that decide what a run computes."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'transformers', 'numpy')
  found = {name: metadata.version(name) for name in names}
  return {'dopd_jax': __version__, 'python': platform.python_version(), **found}
