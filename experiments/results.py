"""What result files say: the choice of a learning rate, means over seeds, paired differences.

same_models  what is compared begins with the same weights
choose       an arm's learning rate, from its tuning runs
estimate     a mean with its 95 % t-interval
paired       the same of the differences between two arms, seed by seed
summarise    every arm's final metric, and its difference to its reference's
forgotten    what an arm once could do and no longer can
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from dopd_jax import config as configs
from dopd_jax import report
from dopd_jax.errors import UserError
from experiments import common
from experiments.grid import Experiment, Run


def read(experiment: Experiment, out: pathlib.Path, kind: str) -> list[dict[str, Any]]:
  """An experiment's results in `results` or `tuning`, by file name; others may lie beside them.

  Raises:
    UserError: a broken file, or results that began with different weights of one model.
  """
  seeds = experiment.tuning_seeds if kind == 'tuning' else experiment.seeds
  found = [_read(path) for path in sorted((out / kind).glob('*.json'))]
  found = [r for r in found if r['arm'] in experiment.arms and r['seed'] in seeds]
  rates = experiment.learning_rates
  found = [r for r in found if kind != 'tuning' or r['learning_rate'] in rates]
  _one_set(found, out)
  return found


def done(run: Run, out: pathlib.Path) -> bool:
  """Whether the run's result is there; raises `UserError` if it is that of another config."""
  path = run.file(out)
  if not path.exists():
    return False
  changed = configs.differences(
    _read(path)['config'], json.loads(configs.to_json(run.config)), configs.MEMORY
  )
  if changed:
    raise UserError(
      f'{path} is the result of another config, which differs in {"; ".join(changed[:5])}: delete '
      'it or name another --out'
    )
  return True


def same_models(runs: Sequence[Run], out: pathlib.Path) -> None:
  """Raises `UserError` where a run would begin with other weights than results beside it.

  A model that is made anew is another one: already the number of cores decides its rounding, and a
  difference paired by seed is one between two runs of the same student.
  """
  there = [_read(path) for kind in ('tuning', 'results') for path in (out / kind).glob('*.json')]
  _one_set([*there, *({'models': common.weights(run.config)} for run in runs)], out)


def of(run: Run, out: pathlib.Path) -> dict[str, Any]:
  """The result of a run that is done."""
  return _read(run.file(out))


def final(result: Mapping[str, Any], metric: str) -> float:
  """The last value of the metric; -inf of a run that was stopped or has no finite one."""
  values = report.series(result['rows'], metric)[1]
  known = 'stopped' not in result and len(values) and math.isfinite(values[-1])
  return float(values[-1]) if known else -math.inf


def choose(cells: Mapping[float, Sequence[float]]) -> float:
  """The learning rate with the best mean of its final metrics; of equals the smallest."""
  # Means of the same numbers in another order may differ in their last bits.
  return max(cells, key=lambda rate: (round(mean(cells[rate]), 9), -rate))


def rates(experiment: Experiment, runs: Sequence[Run], out: pathlib.Path) -> dict[str, float]:
  """The learning rate of every arm, chosen by its tuning runs' results; arm -> rate."""
  found: dict[str, dict[float, list[float]]] = {}
  for run in runs:
    value = final(_read(run.file(out)), experiment.metric)
    found.setdefault(run.arm, {}).setdefault(run.learning_rate, []).append(value)
  return {arm: choose(by_rate) for arm, by_rate in found.items()}


def mean(values: Sequence[float]) -> float:
  """The mean; -inf if one of the values is."""
  return float(np.mean(values))


def cells(results: Sequence[Mapping], arm: str, metric: str) -> dict[float, dict[int, float]]:
  """An arm's tuning: rate -> seed -> final metric, both ascending."""
  found: dict[float, dict[int, float]] = {}
  for result in sorted(results, key=lambda r: (r['learning_rate'], r['seed'])):
    if result['arm'] == arm:
      found.setdefault(result['learning_rate'], {})[result['seed']] = final(result, metric)
  return found


class Estimate(NamedTuple):
  """A mean over seeds; `half` is half the width of its 95 % t-interval, NaN below two values."""

  mean: float
  half: float
  n: int


def estimate(values: Sequence[float]) -> Estimate:
  """Mean +- t(0.975; n - 1) s / sqrt(n), s the standard deviation with n - 1."""
  n = len(values)
  if n < 2:
    return Estimate(float(values[0]) if n else math.nan, math.nan, n)
  half = stats.t.ppf(0.975, n - 1) * stats.sem(values)
  return Estimate(mean(values), float(half), n)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
  """`estimate` of the differences between two arms, on the seeds (keys) that both have."""
  return estimate([values[seed] - reference[seed] for seed in values if seed in reference])


class Summary(NamedTuple):
  """What the results of one arm say."""

  arm: str
  results: list[dict[str, Any]]  # by seed
  finals: dict[int, float]  # seed -> last value, without the runs that were stopped
  start: float  # mean at the first look
  final: Estimate
  difference: Estimate  # to its reference, paired by seed
  means: dict[str, float]  # of other metrics, over those seeds
  also: dict[str, Estimate]  # last values of `Experiment.also`, over those seeds


def summarise(experiment: Experiment, results: Sequence[dict[str, Any]]) -> list[Summary]:
  """One summary an arm that has results, in the experiment's order."""
  finals = {arm: {} for arm in experiment.arms}
  for result in sorted(results, key=lambda r: r['seed']):
    value = final(result, experiment.metric)
    if result['arm'] in finals and math.isfinite(value):
      finals[result['arm']][result['seed']] = value
  found = []
  for arm, values in finals.items():
    own = sorted((r for r in results if r['arm'] == arm), key=lambda r: r['seed'])
    if not own:
      continue
    ended = [r['means'] for r in own if r['seed'] in values]
    means = {n: mean([m[n] for m in ended if n in m]) for n in sorted(set().union(*ended))}
    starts = [s[0] for r in own if len(s := report.series(r['rows'], experiment.metric)[1])]
    found.append(
      Summary(
        arm=arm,
        results=own,
        finals=values,
        start=mean(starts) if starts else math.nan,
        final=estimate(list(values.values())),
        difference=paired(values, finals[experiment.reference(arm)]),
        means=means,
        also={name: _last(own, values, name) for name in experiment.also},
      )
    )
  return found


def forgotten(summary: Summary, metric: str, looks: Sequence[int]) -> Estimate:
  """The best of the looks before the last one, minus the last; over the runs that ended."""
  each = [[at(summary, metric, step).get(seed) for step in looks] for seed in summary.finals]
  return estimate([max(before) - last for *before, last in each if None not in (*before, last)])


def at(summary: Summary, metric: str, step: int) -> dict[int, float]:
  """Seed -> the metric at a step, of the runs that ended and have it."""
  found = {}
  for result in summary.results:
    steps, values = report.series(result['rows'], metric)
    here = values[(steps == step) & np.isfinite(values)]
    if result['seed'] in summary.finals and len(here):
      found[result['seed']] = float(here[-1])
  return found


def _last(results: Sequence[Mapping], seeds: Mapping[int, float], metric: str) -> Estimate:
  found = [final(r, metric) for r in results if r['seed'] in seeds]
  return estimate([value for value in found if math.isfinite(value)])


def _one_set(found: Sequence[Mapping[str, Any]], out: pathlib.Path) -> None:
  """Raises `UserError` where two of them name different weights of one model."""
  known: dict[str, str] = {}
  for result in found:
    for model, digest in result.get('models', {}).items():
      if known.setdefault(model, digest) != digest:
        raise UserError(
          f'{model} is not the model that results in {out} began with: bring that one back, or '
          'delete those results'
        )


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    result = json.loads(path.read_text())
    if missing := {'arm', 'seed', 'learning_rate', 'config', 'rows', 'means'} - result.keys():
      raise ValueError(missing)
  except (ValueError, AttributeError) as error:
    raise UserError(f'{path} is not a whole result: delete it, the same command goes on') from error
  return result
