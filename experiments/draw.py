"""Results as figures: how each arm went, `curves.png`, and where all ended, `finals.png`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dopd_jax import report
from dopd_jax.glossary import metric as about
from dopd_jax.report import INK, RULE, SOFT
from dopd_jax.samples import REGIMES
from experiments.grid import Experiment
from experiments.results import Summary, estimate, summarise
from experiments.tables import cell, interval, is_share

BLUE, TEACHER, REFERENCE = REGIMES['HS'].colour, REGIMES['HT'].colour, '#9a9fa6'


class Band(NamedTuple):
  """Of the runs that were not stopped: means and half widths of the 95 % t-interval by step."""

  steps: np.ndarray
  mean: np.ndarray
  half: np.ndarray


def band(summary: Summary, metric: str) -> Band:
  """Over the seeds that have a finite value at a step."""
  at: dict[int, list[float]] = {}
  for result in summary.results:
    if result['seed'] in summary.finals:
      for step, value in zip(*report.series(result['rows'], metric)):
        if math.isfinite(value):
          at.setdefault(int(step), []).append(float(value))
  found = [estimate(at[step]) for step in sorted(at)]
  means, halves = np.array([e.mean for e in found]), np.array([e.half for e in found])
  return Band(np.array(sorted(at)), means, halves)


def figure(experiment: Experiment, results: Sequence[dict[str, Any]], title: str = '') -> Figure:
  """Small multiples on no global state, one panel an arm: its seeds, their mean and 95 % band.

  In every panel: the mean of the arm's reference in grey, the teacher dashed, the same axes.
  """
  found = summarise(experiment, results)
  columns = min(4, max(len(found), 1))
  lines = -(-len(found) // columns) or 1
  drawn = Figure(figsize=(max(3.0 * columns, 6.4), 2.3 * lines + 1.2))
  drawn.set_layout_engine('constrained', w_pad=0.08, h_pad=0.08, hspace=0.03, wspace=0.02)
  drawn.suptitle(
    f'{title}: {about(experiment.metric).label}' if title else about(experiment.metric).label,
    x=0.012,
    ha='left',
    fontsize=13,
    fontweight='bold',
    color=INK,
    parse_math=False,
  )
  bands = {summary.arm: band(summary, experiment.metric) for summary in found}
  shared: Axes | None = None
  for place, summary in enumerate(found, 1):
    axes = drawn.add_subplot(lines, columns, place, sharex=shared, sharey=shared)
    shared = shared or axes
    _panel(axes, experiment, summary, bands)
    axes.tick_params(labelbottom=place > len(found) - columns, labelleft=(place - 1) % columns == 0)
    if place > len(found) - columns:
      axes.set_xlabel('step', fontsize=8.5, color=SOFT)
  # By the curves alone: a band of two seeds can be many times wider than all of them.
  teacher = _teacher(results, experiment.metric)
  values = np.concatenate([_values(results, experiment.metric), teacher])
  if shared is not None and len(values):
    margin = 0.12 * (values.max() - values.min()) or 0.05
    shared.set_ylim(values.min() - margin, values.max() + margin)
  drawn.legend(
    handles=[
      Line2D([], [], color=BLUE, lw=2, label='mean over seeds'),
      Line2D([], [], color=BLUE, lw=0.8, alpha=0.5, label='a seed'),
      Patch(color=BLUE, alpha=0.16, lw=0, label='95 % t-interval'),
      Line2D([], [], color=REFERENCE, lw=2, label=f'mean of {_reference(experiment)}'),
      *([_TEACHER] if len(teacher) else []),
      *([_STOPPED] if any('stopped' in r for r in results) else []),
    ],
    loc='outside lower left',
    ncols=6,
    frameon=False,
    fontsize=8.5,
    labelcolor=SOFT,
  )
  return drawn


def finals(experiment: Experiment, results: Sequence[dict[str, Any]], title: str = '') -> Figure:
  """A row an arm, as in the table: its seeds as dots, their mean with its 95 % t-interval.

  In each row the dashed mark is where the arm began, the grey one the mean of its reference.
  """
  found, metric = summarise(experiment, results), experiment.metric
  means = {summary.arm: summary.final.mean for summary in found}
  drawn = Figure(figsize=(7.2, 0.34 * len(found) + 1.3), layout='constrained')
  axes = drawn.add_subplot()
  rows(axes, {summary.arm: list(summary.finals.values()) for summary in found})
  for row, summary in enumerate(found):
    place = (row - 0.5, row + 0.5)
    axes.plot([summary.start] * 2, place, color=SOFT, ls=(0, (2, 1.5)), lw=1)
    axes.plot([means.get(experiment.reference(summary.arm), math.nan)] * 2, place, color=REFERENCE)
  # By the seeds: the interval of three can be many times wider than all of them.
  values = [value for s in found for value in (*s.finals.values(), s.start) if math.isfinite(value)]
  if values:
    margin = 0.15 * (max(values) - min(values)) or 0.05
    axes.set_xlim(min(values) - margin, max(values) + margin)
  if is_share(metric):
    axes.xaxis.set_major_formatter(percent)
  axes.set_title(
    f'{title}: {about(metric).label}' if title else about(metric).label,
    loc='left',
    fontsize=12,
    fontweight='bold',
    color=INK,
    parse_math=False,
  )
  axes.set_xlabel(
    f'dots: seeds; square: mean, 95 % t-interval; dashed: start; grey: {_reference(experiment)}',
    fontsize=8.5,
    color=SOFT,
    loc='left',
    parse_math=False,
  )
  return drawn


def rows(axes: Axes, values: Mapping[str, Sequence[float]]) -> None:
  """A row a name: its values as dots, their mean with its 95 % t-interval."""
  for row, each in enumerate(values.values()):
    mean = estimate(each)
    axes.plot(each, [row] * len(each), 'o', color=REFERENCE, ms=4, alpha=0.75, mew=0)
    if mean.n:
      half = mean.half if math.isfinite(mean.half) else 0.0
      axes.errorbar(mean.mean, row, xerr=half, fmt='s', color=BLUE, ms=5.5, lw=1.6)
  name_rows(axes, values)
  axes.grid(axis='x', color=RULE, lw=0.7)
  axes.set_axisbelow(True)


def name_rows(axes: Axes, names: Iterable[str]) -> None:
  """Rows from the top, each with its name, and no frame but the line below."""
  names = list(names)
  axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.tick_params(labelsize=9, colors=SOFT, length=0)
  axes.tick_params(axis='y', labelcolor=INK)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(RULE)


def percent(value: float, _: int = 0) -> str:
  """A share as the name of a tick."""
  return f'{100 * value:.3g} %'


_TEACHER = Line2D([], [], color=TEACHER, lw=1.3, ls='--', label='teacher')
_STOPPED = Line2D([], [], color='#b3261e', marker='x', ls='', label='stopped: not finite')


def _teacher(results: Sequence[dict[str, Any]], metric: str) -> np.ndarray:
  """All finite values of the teacher's, which is measured on what is held out alone."""
  held_out = metric.startswith('eval/')
  return _values(results if held_out else [], metric.replace('eval/', 'eval/teacher_'))


def _values(results: Sequence[dict[str, Any]], metric: str) -> np.ndarray:
  """All finite values of a metric, by run."""
  found = [report.series(r['rows'], metric)[1] for r in results]
  values = np.concatenate(found) if found else np.array([])
  return values[np.isfinite(values)]


def _reference(experiment: Experiment) -> str:
  return 'its reference' if experiment.references else next(iter(experiment.arms))


def _panel(axes: Axes, experiment: Experiment, summary: Summary, bands: Mapping[str, Band]) -> None:
  metric = experiment.metric
  if reference := bands.get(experiment.reference(summary.arm)):
    axes.plot(reference.steps, reference.mean, color=REFERENCE, lw=2)
  for result in summary.results:
    steps, values = report.series(result['rows'], metric)
    axes.plot(steps, values, color=BLUE, lw=0.8, alpha=0.5)
    if 'stopped' in result and len(steps):
      axes.plot(steps[-1:], values[-1:], marker='x', color=_STOPPED.get_color(), ls='')
  teacher = _teacher(summary.results, metric)
  if len(teacher):
    axes.axhline(teacher[-1], color=TEACHER, ls='--', lw=1.3)
  own = bands[summary.arm]
  axes.fill_between(
    own.steps, own.mean - own.half, own.mean + own.half, color=BLUE, alpha=0.16, lw=0
  )
  axes.plot(own.steps, own.mean, color=BLUE, lw=2, marker='o', ms=3)
  _finish(axes, experiment, summary)


def _finish(axes: Axes, experiment: Experiment, summary: Summary) -> None:
  metric = experiment.metric
  axes.set_title(summary.arm, loc='left', fontsize=10, color=INK, pad=16, parse_math=False)
  parts = []
  if summary.final.n:
    parts.append(f'final {cell(metric, summary.final.mean)}{" %" if is_share(metric) else ""}')
  if summary.arm != experiment.reference(summary.arm) and summary.difference.n:
    parts.append(f'difference {interval(metric, summary.difference, "+")}')
  if stopped := sum('stopped' in r for r in summary.results):
    parts.append(f'{stopped} stopped')
  axes.annotate(
    ', '.join(parts), (0, 1), (0, 4), 'axes fraction', 'offset points', fontsize=8, color=SOFT
  )
  axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
  if is_share(metric):
    axes.yaxis.set_major_formatter(percent)
  axes.tick_params(which='both', labelsize=8, colors=SOFT, length=0)
  axes.grid(axis='y', color=RULE, lw=0.7)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(RULE)
