r"""Numbers of a run: `metrics.jsonl`, TensorBoard, and what the terminal shows.

Every rollout batch is one row of numbers, each over the whole global batch. Names are `train/...`,
`eval/...` and `time/...`; the last are the only ones that differ between two identical runs. What
each means stands in `glossary.METRICS`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from rich import progress
from rich.console import Console

from dopd_jax import report
from dopd_jax.objectives import Objective
from dopd_jax.step import Batch, Scored, Updated


def of_update(
  batch: Batch,
  scored: Scored,
  updated: Updated,
  objective: Objective,
  rewards: np.ndarray,
  truncated: np.ndarray,
  sampled: bool = True,
  lag: int = 0,
) -> dict[str, float]:
  """The metrics of one rollout batch. Everything given is on the host.

  Args:
    batch: as trained on.
    scored: its signals and plan.
    updated: what the update told.
    objective: the method.
    rewards: [B] in [0, 1], NaN where no verifier knows.
    truncated: [B] bool, completions that met the length limit.
    sampled: whether the student wrote the completions, so that the sampler has a log-prob to check.
    lag: updates between the sampling and this one.
  """
  mask, regime, token = batch.mask, scored.plan.regime, updated.token
  gap = np.abs(token.logp - batch.logp)[mask]
  values = {
    'train/loss': updated.loss,
    'train/grad_norm': updated.grad_norm,
    'train/lag': lag,
    'train/entropy/S': _mean(token.entropy[mask]),
    'train/completion_length': mask.sum() / len(mask),
    'train/truncated_share': truncated.mean(),
    'train/empty_completions': (~mask.any(1)).sum(),
  }
  if sampled:
    values['train/rollout_logp_gap'] = _mean(gap)
    values['train/rollout_logp_gap_max'] = gap.max(initial=0.0)
  for name, signals in scored.signals.items():
    values[f'train/entropy/{name}'] = _mean(signals.entropy[mask])
  for name, value in scored.plan.scalars.items():
    values[f'train/{name}'] = value

  known = ~np.isnan(rewards)
  weighted = np.where(mask, scored.plan.coef * token.loss, 0.0)
  weight_R = np.array([sum(rule.weight for rule in rules) for rules in objective.rules] + [0.0])
  values['train/effective_weight'] = (scored.plan.coef * weight_R[regime]).sum()
  carries = (scored.plan.coef != 0) & (weight_R[regime] != 0)
  values['train/loss_token_share'] = carries.sum() / max(mask.sum(), 1)
  values['train/extra_forwards'] = len(objective.views)
  for index, name in enumerate(objective.regimes):
    here = regime == index
    values[f'train/regime_share/{name}'] = here.sum() / max(mask.sum(), 1)
    values[f'train/regime_loss/{name}'] = weighted[here].sum()
    squares = updated.head_grad[here].astype(np.float64) ** 2
    values[f'train/head_grad_norm/{name}'] = np.sqrt(squares.sum())
    for side, rows in (('right', known & (rewards >= 0.5)), ('wrong', known & (rewards < 0.5))):
      if rows.any():
        values[f'train/regime_share_{side}/{name}'] = here[rows].sum() / max(mask[rows].sum(), 1)
  if known.any():
    values['train/accuracy'] = rewards[known].mean()
  return {name: float(value) for name, value in values.items()}


def _mean(values: Any) -> float:
  return float(values.mean(dtype=np.float64)) if values.size else 0.0


class Writer:
  """`metrics.jsonl` and TensorBoard in `workdir`; only the first process writes.

  After a resume from step k, rows past k are cut: the resumed run writes them again.
  """

  def __init__(self, workdir: str, resumed_step: int = 0, tensorboard: bool = True):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    self._path = os.path.join(workdir, 'metrics.jsonl')
    rows = (
      [r for r in report.read_metrics(self._path) if r['step'] <= resumed_step]
      if resumed_step
      else []
    )
    partial = f'{self._path}.partial'
    with open(partial, 'w') as file:
      file.writelines(json.dumps(row) + '\n' for row in rows)
    os.replace(partial, self._path)
    self._file = open(self._path, 'a')  # noqa: SIM115 (open for the whole run)
    self._board = None
    if tensorboard:
      directory = os.path.join(workdir, 'tensorboard')
      import tensorboardX  # slow where torch is installed, which it then imports

      self._board = tensorboardX.SummaryWriter(directory, purge_step=resumed_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One row; NaN and infinities become null, since JSON has no word for them."""
    if not self._active:
      return
    row = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
    self._file.write(json.dumps({'step': step, **row}) + '\n')
    self._file.flush()
    known = {name: value for name, value in row.items() if value is not None}
    if self._board is not None and known:
      from tensorboardX.summary import scalar

      # One event: `add_scalar` takes one each, which costs a small model a twentieth of its step.
      whole, *others = (scalar(name, value) for name, value in known.items())
      for other in others:
        whole.MergeFrom(other)
      assert self._board.file_writer  # open until `close`
      self._board.file_writer.add_summary(whole, step)

  def close(self) -> None:
    """Closes both files."""
    if self._active:
      self._file.close()
      if self._board is not None:
        self._board.close()


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
    parts.append(shares)
  if 'train/gap_threshold' in values:
    parts.append(f'gap {get("train/gap"):.3f} (>= {get("train/gap_threshold"):.3f})')
  parts.append(f'H(S) {get("train/entropy/S"):.3f}')
  parts.append(f'len {get("train/completion_length"):.0f}')
  if 'train/accuracy' in values:
    parts.append(f'right {get("train/accuracy"):.0%}')
  parts += [f'|g| {get("train/grad_norm"):.3g}', f'{get("time/tokens_per_second"):,.0f} tok/s']
  return '  '.join(parts)
