r"""Checkpoints that lose nothing: Orbax writes arrays in the background, a manifest commits them.

    checkpoints/00000040/state/         Orbax: the TrainState, on any mesh
    checkpoints/00000040/rollout/       Orbax: completions sampled and not trained on, if any
    checkpoints/00000040/run.json       step, position in the data, metrics of that step
    checkpoints/00000040/manifest.json  SHA-256 of every file; written last

A directory without a manifest is an unfinished save and is never read. An older checkpoint is
deleted only after a newer one has its manifest, so a kill at any moment leaves one that loads. One
whose files are not those of its manifest is damaged: it is passed over, and counts as no checkpoint
until a save of the same step takes its place.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from dopd_jax.errors import SaveFailed, UserError, disk_reason

# What reading JSON of another kind than ours raises; one that is no JSON is a ValueError.
BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    directory: where they live; made when the first is saved.
    keep: how many of the newest to keep.
    best: metric in the saved `metrics` by which the best is kept as well; '' for none.
    lower_is_better: the direction of `best`.
  """

  def __init__(self, directory: str, keep: int = 2, best: str = '', lower_is_better: bool = False):
    # Orbax takes absolute paths only; an address of a bucket is one already.
    local = '://' not in directory
    self._root = epath.Path(os.path.abspath(directory) if local else directory)
    self._keep, self._best, self._sign = keep, best, -1 if lower_is_better else 1
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None
    self._damaged: set[int] = set()  # found so by `newest`
    self._whole: int | None = None  # the one whose files `newest` has compared

  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, oldest first, without those found to be damaged."""
    if not self._root.exists():
      return []
    named = (p for p in self._root.iterdir() if p.name.isdecimal())
    done = {int(p.name) for p in named if (p / 'manifest.json').exists()}
    return sorted(done - self._damaged)

  def newest(self) -> int | None:
    """The newest checkpoint whose files are whole; None where no save was ever finished.

    Those that are not are told in the log and passed over from now on. Nothing is written.

    Raises:
      UserError: there are checkpoints, and all of them are damaged.
    """
    told = ''
    for step in reversed(self.steps()):
      damage = self._damage(step)
      if not damage:
        if told:
          logging.warning('%s: passed over, step %d is whole.', told, step)
        self._whole = step
        return step
      self._damaged.add(step)
      told = told or f'checkpoint {self._path(step)} is damaged ({damage})'
    if told:
      raise UserError(
        f'{told}, and none before it is whole: restore it from a copy, or delete '
        f'{self._root} to begin anew'
      )
    return None

  def best_step(self) -> int | None:
    """The step with the best metric, or None."""
    scored = []
    for step in self.steps():
      try:
        run = json.loads((self._path(step) / 'run.json').read_text())
        if (value := run['metrics'].get(self._best)) is not None:
          scored.append((self._sign * float(value), step))
      except (OSError, *BROKEN):
        continue  # a damaged checkpoint is no best one; `restore` says what is wrong with it
    return max(scored)[1] if scored else None

  def save(self, step: int, state: Any, run: Mapping[str, Any], rollout: Any = None) -> None:
    """Starts a save and returns once `state` may be donated.

    Args:
      step: its number.
      state: a tree of arrays.
      run: JSON-able; must hold `metrics`.
      rollout: a tree of arrays of its own; None for none.

    Raises:
      UserError: an earlier save failed. No finished checkpoint is lost by that.
    """
    self.wait()
    path = self._path(step)
    try:
      if jax.process_index() == 0:  # Orbax waits for it before any process writes
        if path.exists():
          path.rmtree()
        path.mkdir(parents=True)
      self._damaged.discard(step)
      responses = [ocp.save_async(path / 'state', state)]
      if rollout is not None:
        responses.append(ocp.save_async(path / 'rollout', rollout))
    except Exception as error:
      raise self._failed(step, error) from error
    self._thread = threading.Thread(target=self._commit, args=(step, responses, dict(run)))
    self._thread.start()

  def wait(self) -> None:
    """Blocks until the save in flight is durable; raises `UserError` if it failed."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    self.check()

  def check(self) -> None:
    """Raises `UserError` if a save has failed, without waiting."""
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """The state with the shapes, dtypes and shardings of `like`, and the run's facts.

    Raises:
      UserError: a file is missing or changed since it was saved, or the state is another model's.
    """
    path = self._path(step)
    told = step == self._whole or jax.process_index()  # one reading of all files is enough
    if not told and (damage := self._damage(step)):
      raise UserError(
        f'checkpoint {path} is damaged ({damage}): delete that directory, or name another step'
      )
    try:
      state = ocp.load(path / 'state', like)
    except ValueError as error:
      raise UserError(
        f'checkpoint {path} belongs to another model ({str(error).splitlines()[0][:200]}): use '
        'another workdir'
      ) from error
    return state, json.loads((path / 'run.json').read_text())

  def restore_rollout(self, step: int, like: Any) -> Any:
    """The `rollout` of that save, or None. `restore` comes first: it checks the files."""
    path = self._path(step) / 'rollout'
    return ocp.load(path, like) if path.exists() else None

  def _path(self, step: int) -> epath.Path:
    return self._root / f'{step:08d}'

  def _damage(self, step: int) -> str:
    """What is wrong with the files of a finished checkpoint, '' where they are as they were saved.

    The arrays are read once for it.
    """
    path = self._path(step)
    try:
      files = json.loads((path / 'manifest.json').read_text())['files']
      wanted = {*files, 'run.json'}
    except (OSError, *BROKEN):
      return 'manifest.json cannot be read'
    for name in sorted(wanted):
      try:
        if _sha256(path / name) != files[name]:
          return f'{name} has another hash'
      except (OSError, *BROKEN):
        return f'{name} is missing or cannot be read'
    return ''

  def _commit(self, step: int, responses: Sequence[Any], run: dict[str, Any]) -> None:
    path = self._path(step)
    try:
      for response in responses:
        response.result()
      if jax.process_index() == 0:
        _write(path / 'run.json', json.dumps({'step': step, **run}))
        digests = {str(p.relative_to(path)): _sha256(p) for p in _files(path)}
        _write(path / 'manifest.json', json.dumps({'step': step, 'files': digests}, indent=1))
        self._prune()
    except Exception as error:
      self._error = self._failed(step, error)

  def _prune(self) -> None:
    steps = self.steps()
    kept = {*steps[-self._keep :], self.best_step() if self._best else None}
    for step in set(steps) - kept:
      # The manifest goes first: a half-deleted checkpoint must not look finished.
      (self._path(step) / 'manifest.json').unlink()
      self._path(step).rmtree()

  def _failed(self, step: int, error: Exception) -> SaveFailed:
    logging.debug('checkpoint at step %d', step, exc_info=error)
    steps = [s for s in self.steps() if s != step]
    last = f'the last good one is step {steps[-1]}' if steps else 'there is none before it'
    text = disk_reason(error)
    cure = 'make room or choose a workdir that can be written, then ' if text else ''
    text = text or ' '.join(str(error).split())[:200]
    failed = SaveFailed(
      f'the checkpoint at step {step} could not be saved in {self._root} ({text}): {cure}start '
      f'again; {last}'
    )
    failed.__cause__ = error  # it may be that another process is gone
    return failed


def _files(directory: epath.Path) -> list[epath.Path]:
  """Every file below a directory."""
  found = []
  for path in sorted(directory.iterdir()):
    found += _files(path) if path.is_dir() else [path]
  return found


def _write(path: epath.Path, text: str) -> None:
  """Whole or not at all."""
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(text)
  partial.rename(path)


def _sha256(path: epath.Path) -> str:
  digest = hashlib.sha256()
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()
