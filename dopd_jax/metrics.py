r"""Numbers of a run: `metrics.jsonl`, TensorBoard, and what the terminal shows.

A metric is a mean that is kept as (sum, count) until it is written, so that parts of a batch, or
several batches, add up to the mean over all. Names are `train/...`, `eval/...` and `time/...`; the
last are the only ones that differ between two identical runs.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import tensorboardX
from rich import progress
from rich.console import Console

from dopd_jax.step import Batch, Scored, Updated


class Mean(NamedTuple):
  """A mean in the making; adds up."""

  total: float
  count: float = 1.0

  def __add__(self, other: 'Mean') -> 'Mean':  # type: ignore[override]
    return Mean(self.total + other.total, self.count + other.count)

  @property
  def value(self) -> float:
    """The mean; of nothing it is NaN, which is written as null."""
    return self.total / self.count if self.count else math.nan


Means = dict[str, Mean]


def merge(into: Means, new: Mapping[str, Mean]) -> None:
  """Adds `new` to `into`, name by name."""
  for name, mean in new.items():
    into[name] = into[name] + mean if name in into else mean


def of_update(
  batch: Batch,
  scored: Scored,
  updated: Updated,
  regimes: tuple[str, ...],
  rewards: np.ndarray | None,
  truncated: np.ndarray,
) -> Means:
  """The metrics of one rollout batch. Everything given is on the host.

  Args:
    batch: as trained on.
    scored: its signals and plan.
    updated: what the update told.
    regimes: names, by index.
    rewards: [B] in [0, 1], NaN where no verifier knows; None without verifiers.
    truncated: [B] bool, completions that met the length limit.
  """
  mask, regime = batch.mask, scored.plan.regime
  tokens, rows = float(mask.sum()), float(mask.shape[0])
  gap = np.abs(updated.token.logp - batch.logp)
  means = {
    'train/loss': Mean(float(updated.loss)),
    'train/grad_norm': Mean(float(updated.grad_norm)),
    'train/entropy/S': Mean(float(updated.token.entropy[mask].sum()), tokens),
    'train/completion_length': Mean(tokens, rows),
    'train/truncated_share': Mean(float(truncated.sum()), rows),
    'train/empty_completions': Mean(float((~mask.any(1)).sum())),
    'train/rollout_logp_gap': Mean(float(gap[mask].sum()), tokens),
    'train/rollout_logp_gap_max': Mean(float(gap[mask].max(initial=0.0))),
  }
  for name, signals in scored.signals.items():
    means[f'train/entropy/{name}'] = Mean(float(signals.entropy[mask].sum()), tokens)
  for name, value in scored.plan.scalars.items():
    means[f'train/{name}'] = Mean(float(value))

  weighted = np.where(mask, scored.plan.coef * updated.token.loss, 0.0)
  known = None if rewards is None else ~np.isnan(rewards)
  for index, name in enumerate(regimes):
    here = regime == index
    means[f'train/regime_share/{name}'] = Mean(float(here.sum()), tokens)
    means[f'train/regime_loss/{name}'] = Mean(float(weighted[here].sum()))
    norm = math.sqrt(float((updated.head_grad[here].astype(np.float64) ** 2).sum()))
    means[f'train/head_grad_norm/{name}'] = Mean(norm)
    if rewards is not None and known.any():
      for side, chosen in (('right', known & (rewards >= 0.5)), ('wrong', known & (rewards < 0.5))):
        means[f'train/regime_share_{side}/{name}'] = Mean(
          float(here[chosen].sum()), float(mask[chosen].sum())
        )
  if rewards is not None and known.any():
    means['train/accuracy'] = Mean(float(rewards[known].sum()), float(known.sum()))
  return means


class Writer:
  """`metrics.jsonl` and TensorBoard in `workdir`; only the first process writes.

  After a resume from step k, rows past k are cut: the resumed run writes them again.
  """

  def __init__(self, workdir: str, resumed_step: int = 0, tensorboard: bool = True):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    self._path = os.path.join(workdir, 'metrics.jsonl')
    rows = [r for r in read(self._path) if r['step'] <= resumed_step] if resumed_step else []
    partial = f'{self._path}.partial'
    with open(partial, 'w') as file:
      file.writelines(json.dumps(row) + '\n' for row in rows)
    os.replace(partial, self._path)
    self._file = open(self._path, 'a')  # noqa: SIM115 (open for the whole run)
    self._board = None
    if tensorboard:
      directory = os.path.join(workdir, 'tensorboard')
      self._board = tensorboardX.SummaryWriter(directory, purge_step=resumed_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One row; NaN and infinities become null, since JSON has no word for them."""
    if not self._active:
      return
    row = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
    self._file.write(json.dumps({'step': step, **row}) + '\n')
    self._file.flush()
    if self._board is not None:
      for name, value in row.items():
        if value is not None:
          self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes both files."""
    if self._active:
      self._file.close()
      if self._board is not None:
        self._board.close()


def read(path: str) -> list[dict]:
  """The rows of a `metrics.jsonl`; a last line that a killed process left broken is dropped."""
  rows = []
  if os.path.exists(path):
    with open(path) as file:
      for line in file:
        try:
          rows.append(json.loads(line))
        except json.JSONDecodeError:
          break
  return rows


def bar(console: Console, unit: str = 'tok/s') -> progress.Progress:
  """A progress bar with a rate and the time left."""
  return progress.Progress(
    progress.TextColumn('{task.description}'),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn('{task.fields[rate]} ' + unit),
    progress.TimeElapsedColumn(),
    progress.TextColumn('left'),
    progress.TimeRemainingColumn(),
    console=console,
    transient=not console.is_terminal,
  )


def line(step: int, steps: int, values: Mapping[str, float], regimes: Iterable[str]) -> str:
  """The readable line of a log step."""
  get = lambda name: values.get(name, math.nan)
  parts = [f'step {step:>{len(str(steps))}}/{steps}', f'loss {get("train/loss"):.4f}']
  names = [r for r in regimes if f'train/regime_share/{r}' in values]
  if len(names) > 1:
    shares = ' '.join(f'{r} {get(f"train/regime_share/{r}"):.0%}' for r in names)
    parts += [shares, f'gap {get("train/gap"):.3f} (>= {get("train/gap_threshold"):.3f})']
  parts.append(f'H(S) {get("train/entropy/S"):.3f}')
  parts.append(f'len {get("train/completion_length"):.0f}')
  if 'train/accuracy' in values:
    parts.append(f'right {get("train/accuracy"):.0%}')
  parts += [f'|g| {get("train/grad_norm"):.3g}', f'{get("time/tokens_per_second"):,.0f} tok/s']
  return '  '.join(parts)
