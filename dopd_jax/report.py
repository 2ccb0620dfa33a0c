"""What is left of a run for the eye: `report.png`, and a table for the end of the terminal's log.

Both are made from the rows of `metrics.jsonl`, one JSON object a line with a `step`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from rich import box
from rich.table import Table

from dopd_jax.errors import UserError
from dopd_jax.glossary import metric
from dopd_jax.samples import OTHER_COLOURS, REGIMES

Row = Mapping[str, Any]


# The rows of the final table, and where a best value is the largest or the smallest.
MAIN = (
  *('eval/accuracy', 'eval/teacher_accuracy', 'train/loss'),
  *(f'train/entropy/{policy}' for policy in ('S', 'Sp', 'Tp')),
  *(f'train/regime_share/{regime}' for regime in REGIMES),
  *('train/gap', 'train/completion_length', 'train/truncated_share'),
  *('train/rollout_logp_gap', 'time/tokens_per_second'),
)
BEST: dict[str, Callable[[np.ndarray], Any]] = {
  'eval/accuracy': np.argmax,
  'train/loss': np.argmin,
  'time/tokens_per_second': np.argmax,
}

INK, SOFT, RULE = '#1c1d1f', '#6a6f76', '#dfe0e2'
POLICY_COLOURS = {'S': INK, 'Sp': REGIMES['HS'].colour, 'Tp': REGIMES['HT'].colour, 'T': '#d1662c'}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
  """The 95 % Wilson score interval of a share of `n` trials; (0, 1) when there were none.

  Raises:
    ValueError: not 0 <= successes <= n.
  """
  if n == 0 and successes == 0:
    return 0.0, 1.0
  from scipy.stats import binomtest  # a second to import

  interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method='wilson')
  return float(interval.low), float(interval.high)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`. A last line that a killed process left unfinished is dropped.

  Raises:
    UserError: no such file, or a broken line that is not the last.
  """
  path = Path(path)
  try:
    lines = path.read_text('utf-8', errors='replace').splitlines()
  except FileNotFoundError:
    raise UserError(f'there is no {path}: give the metrics.jsonl of a run that has begun') from None
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      if not _is_row(row):
        raise ValueError
    except (ValueError, RecursionError):
      if number == len(lines):
        break
      raise UserError(
        f'line {number} of {path} is not a metrics row (numbers with a step): remove it'
      ) from None
    rows.append(row)
  return rows


def _is_row(row: Any) -> bool:
  """Whether something is an object with a whole `step` and numbers, or null, beside it."""
  if not isinstance(row, dict) or type(row.get('step')) is not int or not 0 <= row['step'] < 2**53:
    return False
  return all(value is None or type(value) in (int, float) for value in row.values())


def series(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps (ascending) and values of the rows that have the metric; of a repeated step the last.

  A value that is None or not finite is NaN, so that it is a hole in a plotted line.
  """
  found = {row['step']: row[name] for row in rows if name in row}
  steps = sorted(found)
  values = np.array([math.nan if found[s] is None else found[s] for s in steps], np.float64)
  return np.array(steps), np.where(np.isfinite(values), values, math.nan)


def write_report(metrics_path: str | Path, path: str | Path, *, title: str = '') -> Path:
  """Draws the rows of a `metrics.jsonl` as one PNG; panels without metrics are left out."""
  drawn = figure(read_metrics(metrics_path), title=title)
  drawn.savefig(path, format='png', dpi=150)
  return Path(path)


# ------------------------------------------------------------------------------------- the figure


MANY = 60  # from so many points on, a line is drawn faint under its running mean


class Panel(NamedTuple):
  title: str
  draw: Callable[[Axes], None]
  subtitle: str = ''  # where there is no legend


def figure(rows: Sequence[Row], title: str = '') -> Figure:
  """The report as a matplotlib figure, on no global state: one axes a panel, titled."""
  panels = _panels(rows)
  columns = min(3, max(len(panels), 1))
  lines = -(-len(panels) // columns) or 1
  drawn = Figure(figsize=(4.6 * columns, 2.9 * lines + 1.0))
  drawn.set_layout_engine('constrained', w_pad=0.12, h_pad=0.1, hspace=0.04, wspace=0.03)
  # A title is a run's name: a dollar in it is no formula.
  drawn.suptitle(
    title, x=0.012, ha='left', fontsize=14, fontweight='bold', color=INK, parse_math=False
  )
  every_step = [row['step'] for row in rows]
  for place, panel in enumerate(panels, 1):
    axes = drawn.add_subplot(lines, columns, place)
    panel.draw(axes)
    _finish(axes, panel, every_step, last_line=place > len(panels) - columns)
  if not panels:
    drawn.text(0.5, 0.5, 'No metrics to draw.', ha='center', color=SOFT)
  notes = []
  if any(panel.title.startswith('Regime') for panel in panels):
    notes.append(', '.join(f'{name} {style.name}' for name, style in REGIMES.items()))
  if len(set(every_step)) >= MANY:
    notes.append('faint lines: every row, bold lines: running mean over a tenth of the rows')
  drawn.supxlabel(';  '.join(notes), x=0.012, ha='left', fontsize=8, color=SOFT)
  return drawn


def _panels(rows: Sequence[Row]) -> list[Panel]:
  """The panels whose metrics have at least one finite value, in reading order."""
  has = {
    name
    for row in rows
    for name, value in row.items()
    if isinstance(value, int | float) and math.isfinite(value)
  }

  def family(prefix: str) -> dict[str, str]:
    names = [name.removeprefix(prefix) for name in has if name.startswith(prefix)]
    known = list(REGIMES)  # first and in their own order, others by name after them
    names.sort(key=lambda n: (known.index(n) if n in known else len(known), n))
    return {prefix + name: name for name in names}

  def line_panel(title: str, labels: dict[str, str], **kwargs) -> list[Panel]:
    labels = {name: label for name, label in labels.items() if name in has}
    if not labels:
      return []
    first = metric(next(iter(labels)))
    unit = f' ({first.unit})' if first.unit and not kwargs.get('percent') else ''
    subtitle = first.meaning if len(labels) == 1 else ''
    return [Panel(title + unit, lambda axes: _lines(axes, rows, labels, **kwargs), subtitle)]

  panels = []
  if 'eval/accuracy' in has:
    panels.append(Panel('Accuracy on held-out prompts', lambda axes: _accuracy(axes, rows)))
  entropies = {f'train/entropy/{policy}': policy for policy in POLICY_COLOURS}
  panels += line_panel('Entropy', entropies | family('train/entropy/'))
  both_ways = {f'eval/{way}_kl': metric(f'eval/{way}_kl').label for way in ('reverse', 'forward')}
  panels += line_panel('KL to the plain teacher', both_ways)
  panels += line_panel('Loss', {'train/loss': 'all', **family('train/regime_loss/')})
  for title, prefix in (
    ('Regime shares', 'train/regime_share/'),
    ('Regime shares, right answers', 'train/regime_share_right/'),
    ('Regime shares, wrong answers', 'train/regime_share_wrong/'),
  ):
    names = family(prefix)
    if len(names) > 1:
      panels.append(Panel(title, lambda axes, names=names: _shares(axes, rows, names)))
  gap = {'train/gap': 'mean', 'train/gap_threshold': 'threshold'}
  panels += line_panel('Privilege advantage gap', gap)
  confidence = {'train/confidence': 'mean', 'train/confidence_threshold': 'threshold'}
  panels += line_panel('Confidence', confidence, bottom=None)
  norms = {'train/grad_norm': 'parameters', **family('train/head_grad_norm/')}
  panels += line_panel('Gradient norm', norms, log=True)
  panels += line_panel('Completion length', {'train/completion_length': ''})
  panels += line_panel('Truncated completions', {'train/truncated_share': ''}, percent=True)
  panels += line_panel('Sampler/trainer log-prob gap', {'train/rollout_logp_gap': ''}, log=True)
  return panels


def _colour(name: str, place: int) -> str:
  """By the last part of a metric's name if that is a regime or a policy, else by its place."""
  last = name.rpartition('/')[2]
  if last in REGIMES:
    return REGIMES[last].colour
  return POLICY_COLOURS.get(last) or (INK, *OTHER_COLOURS)[place % (1 + len(OTHER_COLOURS))]


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Centred mean over a tenth of the values, holes left out, windows cut at the ends."""
  window = np.ones(max(len(values) // 10, 1))
  known = np.isfinite(values)
  total = np.convolve(np.where(known, values, 0.0), window, 'same')
  count = np.convolve(known.astype(np.float64), window, 'same')
  return np.where(known & (count > 0), total / np.maximum(count, 1.0), math.nan)


def _lines(
  axes: Axes,
  rows: Sequence[Row],
  labels: Mapping[str, str],
  *,
  bottom: float | None = 0.0,
  log: bool = False,
  percent: bool = False,
) -> None:
  """One line a metric. `bottom` starts the axis unless a value is lower; `log` takes decades."""
  found = []
  for place, (name, label) in enumerate(labels.items()):
    steps, values = series(rows, name)
    found.append(values[np.isfinite(values)])
    colour = _colour(name, place)
    if len(steps) >= MANY:
      axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
      axes.plot(steps, _running_mean(values), color=colour, label=label, lw=1.8)
    else:
      axes.plot(steps, values, color=colour, label=label, lw=1.6, marker='o', ms=3)
  low, high = np.concatenate(found).min(), np.concatenate(found).max()
  if log and low > 0:
    axes.set_yscale('log')
    axes.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(1.1 * high)))
    axes.yaxis.set_minor_locator(NullLocator())
  elif bottom is not None and low >= bottom:
    axes.set_ylim(bottom, max(1.08 * high, 0.05 if percent else 1e-9))
  if percent:
    axes.yaxis.set_major_formatter(_percent)
  if len(labels) > 1:
    _legend(axes, len(labels))


def _percent(value: float, _: float) -> str:
  return f'{100 * value:.3g} %'


def _accuracy(axes: Axes, rows: Sequence[Row]) -> None:
  steps, values = series(rows, 'eval/accuracy')
  low_steps, low = series(rows, 'eval/accuracy_low')
  _, high = series(rows, 'eval/accuracy_high')
  blue = REGIMES['HS'].colour
  if len(low_steps) and len(low) == len(high):
    axes.fill_between(low_steps, low, high, color=blue, alpha=0.16, lw=0, label='95 % interval')
    axes.vlines(low_steps, low, high, color=blue, alpha=0.35, lw=1)
  axes.plot(steps, values, color=blue, marker='o', ms=3.5, lw=1.8, label='student')
  if steps[0] == 0 and np.isfinite(values[0]):
    axes.axhline(values[0], color=SOFT, ls=':', lw=1.3, label='before training')
  teacher = series(rows, 'eval/teacher_accuracy')[1]
  teacher = teacher[np.isfinite(teacher)]
  if len(teacher):
    axes.axhline(teacher[-1], color=REGIMES['HT'].colour, ls='--', lw=1.3, label='teacher')
  axes.yaxis.set_major_formatter(_percent)
  _legend(axes, 4)


def _shares(axes: Axes, rows: Sequence[Row], names: Mapping[str, str]) -> None:
  """Stacked areas. A step without a share (no right answer in the batch, say) is bridged over."""
  found = [dict(zip(*series(rows, name))) for name in names]
  steps = sorted(step for step in set().union(*found) if any(f.get(step, -1) >= 0 for f in found))
  heights = np.nan_to_num([[values.get(step, 0.0) for step in steps] for values in found])
  if len(steps) == 1:  # an area needs two points
    steps, heights = [steps[0] - 0.4, steps[0] + 0.4], heights.repeat(2, axis=1)
  colours = [_colour(name, place) for place, name in enumerate(names)]
  axes.stackplot(steps, heights, labels=list(names.values()), colors=colours, ec='white', lw=0.4)
  axes.set_ylim(0, 1)
  axes.yaxis.set_major_formatter(_percent)
  _legend(axes, len(names))


def _legend(axes: Axes, columns: int) -> None:
  """Above the plot, where it can cover no data."""
  axes.legend(
    loc='lower left',
    bbox_to_anchor=(0, 1),
    borderaxespad=0.1,
    ncols=columns,
    frameon=False,
    fontsize=8,
    handlelength=1.1,
    handletextpad=0.4,
    columnspacing=1.0,
    labelcolor=SOFT,
  )


def _finish(axes: Axes, panel: Panel, steps: Sequence[int], last_line: bool) -> None:
  axes.set_title(panel.title, loc='left', fontsize=10.5, color=INK, pad=20)
  axes.annotate(
    panel.subtitle, (0, 1), (0, 5), 'axes fraction', 'offset points', fontsize=8, color=SOFT
  )
  low, high = min(steps), max(steps)
  margin = 0.015 * (high - low) or 1
  axes.set_xlim(low - margin, high + margin)
  axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
  if last_line:
    axes.set_xlabel('step', fontsize=8.5, color=SOFT)
  axes.tick_params(which='both', labelsize=8, colors=SOFT, length=0)
  axes.grid(axis='y', color=RULE, lw=0.7)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(RULE)


# -------------------------------------------------------------------------------------- the table


def summary_table(rows: Sequence[Row], title: str = 'Summary') -> Table:
  """Start, end and best of the main metrics that the rows hold; accuracies with their interval."""
  table = Table(
    title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, pad_edge=False
  )
  table.add_column('')
  for column in ('start', 'end', 'best'):
    table.add_column(column, justify='right', no_wrap=True)
  for name in MAIN:
    steps, values = series(rows, name)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
      continue
    label, unit, _ = metric(name)
    after = '' if unit in ('', 'share') else f' {unit}'
    best = ''
    if name in BEST:
      i = BEST[name](values)
      best = f'{_cell(name, values[i])} at {steps[i]}'
    start, end = (
      f'{_cell(name, values[i])}{_interval(rows, name, steps[i]) or after}' for i in (0, -1)
    )
    table.add_row(label, start, end, best)
  return table


def _cell(name: str, value: float) -> str:
  if metric(name).unit == 'share':
    return f'{100 * value:.1f} %'
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'


def _interval(rows: Sequence[Row], name: str, step: int) -> str:
  low, high = (dict(zip(*series(rows, name + end))).get(step) for end in ('_low', '_high'))
  return '' if low is None or high is None else f' ({100 * low:.1f}-{100 * high:.1f})'
