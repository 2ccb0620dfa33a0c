r"""How right are the ends of an experiment's runs when they sample, and how diverse?

  python -m experiments.sampled teachers     # writes sampled.json and sampled.md in its folder

Asked are the students at their start and at the end of every run: the problems of `data.eval`, four
answers each at temperature 1. avg@4 is the share of right answers, pass@4 the share of problems
that any of the four has right. The workdirs of the runs must be there, with their checkpoints:
`python -m experiments.run NAME` leaves them on the machine where it ran.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping

import jax
import numpy as np
from rich.console import Console

from dopd_jax import cli, dataset, evaluation, export, metrics, policies, sharding, workdirs
from dopd_jax.config import Config, Policy
from dopd_jax.errors import UserError
from dopd_jax.rollout import Sampling
from experiments import common, contrasts, grid, results
from experiments.grid import Experiment, Run
from experiments.results import estimate

DRAWS = 4
START = 'start'
SCORES = {f'avg@{DRAWS}': lambda hits: hits / DRAWS, f'pass@{DRAWS}': lambda hits: hits > 0}
Found = Mapping[str, Mapping[str, str]]  # arm -> seed -> right answers to each problem, 0 to 4


def draws(path: str, config: Config) -> str:
  """How many of four sampled answers are right, a digit a problem.

  Answer k of every model is drawn with seed k.

  Args:
    path: of the model.
    config: of a run; its `data.eval` is asked.
  """
  config = dataclasses.replace(config, student=Policy(path=path))
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])  # tiny models
  with jax.set_mesh(mesh), metrics.bar(Console(stderr=True)) as progress:
    pair = policies.load_pair(config, mesh, set())
    examples = dataset.open_held_out(config, pair)['']
    sampling = Sampling(max_new_tokens=config.rollout.max_new_tokens, temperature=1.0)
    generate = evaluation.make_generate(pair.student.model, sampling, pair)
    judges = [
      evaluation.Judge(examples, pair, mesh, config.microbatch, config.data.prompt_bucket, seed)
      for seed in range(DRAWS)
    ]
    params = pair.student.params
    right = [judge.accuracy('sampled', generate, params, progress)[1] for judge in judges]
  return ''.join(map(str, np.sum(np.stack(right) >= 0.5, axis=0)))


def measure(experiment: Experiment, kept: pathlib.Path, runs: pathlib.Path) -> Found:
  """Of the students at the start and of every run at its end.

  Raises:
    UserError: the workdir of a run is not there, it did not end, or students differ by arm.
  """
  rates = results.rates(experiment, grid.tuning_runs(experiment, list(experiment.arms)), kept)
  todo = grid.final_runs(experiment, rates or dict.fromkeys(experiment.arms))
  for run in todo:
    if not run.workdir(runs).exists():
      raise UserError(f'{run.workdir(runs)} is not there: give experiments.run first')
  if len({(run.seed, run.config.student.path, run.config.data.eval) for run in todo}) != len(
    experiment.seeds
  ):
    raise UserError('its arms begin with other students or problems: there is no one start')
  found: dict[str, dict[str, str]] = {START: {}}
  with common.bar(Console()) as bar:
    for run in bar.track(todo, description='runs'):
      seed = str(run.seed)
      if seed not in found[START]:
        found[START][seed] = draws(run.config.student.path, run.config)
      found.setdefault(run.arm, {})[seed] = end(run, runs)
  return found


def end(run: Run, runs: pathlib.Path) -> str:
  """`draws` of the last checkpoint of a run; raises `UserError` where that is not its end."""
  with tempfile.TemporaryDirectory() as folder:
    step = export.export(str(run.workdir(runs)), f'{folder}/student')
    if step != run.config.steps:
      raise UserError(f'{run.name} is at step {step} of {run.config.steps}: let it end first')
    return draws(f'{folder}/student', run.config)


def page(experiment: Experiment, found: Found) -> str:
  """sampled.md."""
  lines = [
    'At temperature 1, four answers a problem, %: mean over seeds with its 95 % t-interval; the '
    'difference to the reference, paired by seed, and its bootstrap over seeds and problems.',
    '',
    f'| arm | {" | ".join(f"{name} | minus its reference" for name in SCORES)} |',
    f'|---|{"---:|---:|" * len(SCORES)}',
  ]
  for arm in found:
    cells = [arm]
    for score in SCORES.values():
      mean = estimate([100 * each.mean() for each in problems(found, arm, score).values()])
      cells += [f'{mean.mean:.1f} ± {mean.half:.1f}', '–']
      if arm != START and (reference := experiment.reference(arm)) != arm:
        cells[-1] = f'{difference(found, arm, reference, score)} ({reference})'
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def problems(found: Found, arm: str, score: Callable) -> dict[str, np.ndarray]:
  """Seed -> the score of each problem."""
  return {seed: 1.0 * score(np.array(list(hits), int)) for seed, hits in found[arm].items()}


def difference(found: Found, arm: str, reference: str, score: Callable) -> str:
  """In points, with both intervals."""
  ours, theirs = (problems(found, name, score) for name in (arm, reference))
  each = [ours[seed] - theirs[seed] for seed in ours]
  gap, (low, high) = estimate([100 * d.mean() for d in each]), contrasts.bootstrap(each)
  return f'{gap.mean:+.1f} ± {gap.half:.1f}, {100 * low:+.1f} to {100 * high:+.1f}'


def main() -> None:
  """The command."""
  if not _NAME:
    raise UserError('name an experiment first: python -m experiments.sampled NAME')
  experiment, folder = grid.load(_NAME), pathlib.Path('experiments', _NAME)
  pool = experiment.pool or _NAME
  common.end_by_interrupt()
  cli.keep_compilations()
  found = measure(
    experiment, pathlib.Path('experiments', pool), pathlib.Path('runs/experiments', pool)
  )
  with workdirs.writing(str(folder / 'sampled.json')) as file:
    json.dump(found, file, indent=1)
  with workdirs.writing(str(folder / 'sampled.md')) as file:
    file.write(page(experiment, found))
  Console().print(page(experiment, found))


if __name__ == '__main__':
  # The experiment's name is no flag: it is taken off before the flags are read.
  _NAME = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith('-') else ''
  cli.run(main)
