"""Results as tables: `table.md`, and the same for the terminal."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich import table as rich_table

from dopd_jax import report
from dopd_jax.glossary import metric as about
from experiments.contrasts import Contrast, contrasts
from experiments.grid import Experiment
from experiments.results import Estimate, Summary, at, cells, estimate, forgotten, mean, summarise

NONE = '–'
# Shown where the results have them; short heads, since the table is wide.
EXTRA = {
  'train/entropy/S': 'entropy of S',
  'train/effective_weight': 'effective weight',
  'train/loss_token_share': 'loss token share',
  'train/grad_norm': 'gradient norm',
  'time/step_seconds': 's a step',
  'train/extra_forwards': 'extra forwards',
  'time/score_seconds': 's of them a step',
}


class Table(NamedTuple):
  """Rows of cells; the first column is text, the others are numbers."""

  title: str
  heads: list[str]
  rows: list[list[str]]

  def markdown(self) -> str:
    """As GitHub reads it."""
    line = lambda row: f'| {" | ".join(row)} |'
    rule = '|---|' + '---:|' * (len(self.heads) - 1)
    return '\n'.join([f'**{self.title}**', '', line(self.heads), rule, *map(line, self.rows)])

  def rich(self, width: int) -> rich_table.Table:
    """For a terminal of so many columns; the last ones are left out where they do not fit."""
    made = rich_table.Table(
      title=self.title,
      title_justify='left',
      title_style='bold',
      box=box.SIMPLE_HEAD,
      show_edge=False,
      pad_edge=False,
      padding=(0, 1, 0, 0),  # two columns between cells, with the rule's
    )
    columns = list(zip(self.heads, *self.rows))
    least = lambda column: max(map(len, [*column[0].split(), *column[1:]]))  # heads may wrap
    while len(columns) > 2 and sum(2 + least(column) for column in columns) > width:
      columns.pop()
    for place, column in enumerate(columns):
      made.add_column(column[0], justify='right' if place else 'left', width=least(column))
    for row in zip(*(rest for _, *rest in columns)):
      made.add_row(*row)
    return made


def tables(
  experiment: Experiment, results: Sequence[dict[str, Any]], tuning: Sequence[dict[str, Any]]
) -> list[Table]:
  """The arms; contrasts, looks and the cells of the tuning where there are any."""
  found = summarise(experiment, results)
  rates = {s.arm: {r['learning_rate'] for r in s.results} for s in found}
  made = [_arms_table(experiment, found)]
  if tested := contrasts(experiment.contrasts, results, experiment.metric):
    made.append(_contrasts_table(experiment, tested))
  if experiment.looks:
    made.append(_looks_table(experiment, found))
  if tuning:
    made.append(_tuning_table(experiment, tuning, rates))
  return made


def page(
  experiment: Experiment, name: str, made: Sequence[Table], results: Sequence[dict[str, Any]]
) -> str:
  """`table.md`: the question, the tables, and how to read and remake them."""
  versions = {f'jax {r["versions"]["jax"]}' for r in results if 'jax' in r.get('versions', {})}
  made_with = [
    *sorted(versions),
    *sorted({f'on {r["device"]}' for r in results if r.get('device')}),
    *sorted({f'commit {r["commit"][:12]}' for r in results if r.get('commit')}),
  ]
  there = {r['arm'] for r in results}
  missing = [arm for arm in experiment.arms if arm not in there]
  notes = (
    f'`{experiment.metric}`: mean over seeds, ± half the width of its 95 % t-interval. The '
    f'difference to {_references(experiment)} is paired by seed and has its own interval. No '
    'interval is corrected for the number of arms. A run that was stopped (not finite) counts in '
    'no mean, and in the tuning as the worst. '
    f'{_also(experiment)}The columns to the right are means over steps and seeds; s a step is the '
    'median over steps. '
    f'Made by `python -m experiments.run {name}` ({", ".join(made_with)}).'
  )
  if missing:
    notes += f' Not run yet: {", ".join(missing)}.'
  return '\n\n'.join(
    [f'# {pathlib.Path(name).name}', experiment.question, *(t.markdown() for t in made), notes, '']
  )


def _references(experiment: Experiment) -> str:
  return 'its reference' if experiment.references else f'`{next(iter(experiment.arms))}`'


def _also(experiment: Experiment) -> str:
  if not experiment.also:
    return ''
  return f'Last values: {", ".join(f"`{name}`" for name in experiment.also)}. '


def in_words(experiment: Experiment, result: Mapping[str, Any]) -> str:
  """How a run ended, for a line."""
  if 'stopped' in result:
    return f'stopped: {result["stopped"]}'
  values = report.series(result['rows'], experiment.metric)[1]
  unit = ' %' if is_share(experiment.metric) else ''
  start, end = (cell(experiment.metric, values[i]) if len(values) else NONE for i in (0, -1))
  return f'{start} -> {end}{unit}'


def _arms_table(experiment: Experiment, found: Sequence[Summary]) -> Table:
  extra = {name: head for name, head in EXTRA.items() if any(name in s.means for s in found)}
  first = next(iter(experiment.arms))
  percent = ', %' if is_share(experiment.metric) else ''
  heads = ['arm', 'learning rate', 'n', f'start{percent}', f'final{percent}']
  heads += [
    f'minus {"its reference" if experiment.references else first}',
    *(_head(name) for name in experiment.also),
    *extra.values(),
  ]
  rows = []
  for s in found:
    rate = ', '.join(f'{x:g}' for x in sorted({r['learning_rate'] for r in s.results}))
    stopped = sum('stopped' in r for r in s.results)
    n = f'{s.final.n}' + (f' ({stopped} stopped)' if stopped else '')
    difference, against = NONE, experiment.reference(s.arm)
    if s.arm != against:
      difference = interval(experiment.metric, s.difference, '+')
      difference += f' ({against})' if experiment.references else ''
    row = [s.arm, rate, n, cell(experiment.metric, s.start)]
    row += [interval(experiment.metric, s.final), difference]
    row += [interval(name, s.also[name]) for name in experiment.also]
    rows.append(row + [f'{s.means[m]:.3g}' if m in s.means else NONE for m in extra])
  return Table('Arms', heads, rows)


def _head(metric: str) -> str:
  return f'{metric.removeprefix("eval/").removeprefix("train/")}{", %" if is_share(metric) else ""}'


def _contrasts_table(experiment: Experiment, tested: Sequence[Contrast]) -> Table:
  metric = experiment.metric
  percent = ', points' if is_share(metric) else ''
  heads = ['contrast', 'n', f'difference{percent}', 'bootstrap, seeds and problems', 'p', 'Holm p']
  rows = []
  for c in tested:
    both = f'{cell(metric, c.low, "+")} to {cell(metric, c.high, "+")}'
    difference = interval(metric, c.difference, '+')
    p = [f'{value:.2g}' for value in (c.p, c.corrected)]
    rows.append([f'{c.arm} - {c.reference}', str(c.difference.n), difference, both, *p])
  return Table('Contrasts, paired by seed; p of sign flips', heads, rows)


def _looks_table(experiment: Experiment, found: Sequence[Summary]) -> Table:
  rows = []
  for s in found:
    for step in experiment.looks:
      each = [(name, estimate(list(at(s, name, step).values()))) for name in experiment.also]
      rows.append([f'{s.arm}, step {step}', *(interval(*x) for x in each)])
    lost = [(name, forgotten(s, name, experiment.looks)) for name in experiment.also]
    rows.append([f'{s.arm}, forgotten', *(interval(*x, '+') for x in lost)])
  heads = ['arm', *(_head(name) for name in experiment.also)]
  return Table('By step; forgotten: the best before, minus the last', heads, rows)


def _tuning_table(
  experiment: Experiment, tuning: Sequence[dict[str, Any]], rates: Mapping[str, set[float]]
) -> Table:
  percent = ' in %' if is_share(experiment.metric) else ''
  rows = []
  for arm in experiment.arms:
    for rate, by_seed in cells(tuning, arm, experiment.metric).items():
      one = [cell(experiment.metric, by_seed.get(s, math.nan)) for s in experiment.tuning_seeds]
      chosen = 'yes' if rate in rates.get(arm, ()) else ''
      average = cell(experiment.metric, mean(list(by_seed.values())))
      rows.append([arm, f'{rate:g}', *one, average, chosen])
  heads = ['arm', 'learning rate', *(f'seed {s}' for s in experiment.tuning_seeds)]
  title = f'Tuning: final {experiment.metric}{percent} of every cell'
  return Table(title, [*heads, 'mean', 'chosen'], rows)


def is_share(metric: str) -> bool:
  """Whether the metric is shown in per cent."""
  return about(metric).unit == 'share'


def cell(metric: str, value: float, sign: str = '') -> str:
  """A value of the metric; shares in per cent."""
  if not math.isfinite(value):
    return 'stopped' if value == -math.inf else NONE
  return f'{100 * value:{sign}.1f}' if is_share(metric) else f'{value:{sign}.4g}'


def interval(metric: str, e: Estimate, sign: str = '') -> str:
  """`mean ± half`, shares to .1 %, others to the half's second digit; a dash if not known."""
  if not e.n:
    return NONE
  if not is_share(metric) and math.isfinite(e.half) and e.half:
    places = max(0, 1 - math.floor(math.log10(e.half)))
    return f'{e.mean:{sign}.{places}f} ± {e.half:.{places}f}'
  return f'{cell(metric, e.mean, sign)} ± {cell(metric, e.half)}'
