r"""How right are the ends of an experiment's runs when they sample, and how diverse?

  python -m experiments.sampled teachers     # writes sampled.json and sampled.md in its folder

Every student, as the run of the first arm began and as each run ended, answers the problems of
`data.eval` four times at temperature 1: avg@4 is the share of right answers, pass@4 the share of
problems that any of the four has right. The workdirs of the runs must be there, with their
checkpoints: `python -m experiments.run NAME` leaves them on the machine where it ran.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping

import jax
import numpy as np
from rich.console import Console

from dopd_jax import cli, dataset, evaluation, export, metrics, policies, sharding, workdirs
from dopd_jax.config import Config, Policy
from dopd_jax.errors import UserError
from dopd_jax.rollout import Sampling
from experiments import common, grid, results, workers
from experiments.grid import Experiment, Run
from experiments.results import estimate, paired

DRAWS = 4
START = 'start'
Found = Mapping[str, Mapping[str, Mapping[str, float]]]  # arm -> seed -> avg@4, pass@4


def draws(path: str, config: Config, count: int = DRAWS) -> np.ndarray:
  """What a model has right, [count, n], 0 to 1, at temperature 1 and on draws of their own.

  Args:
    path: of the model.
    config: of a run; its `data.eval` is asked.
    count: answers a problem.
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
      for seed in range(count)
    ]
    params = pair.student.params
    return np.stack([judge.accuracy('sampled', generate, params, progress)[1] for judge in judges])


def scores(right: np.ndarray) -> dict[str, float]:
  """avg@count and pass@count of what `draws` returns."""
  count = len(right)
  return {f'avg@{count}': float(right.mean()), f'pass@{count}': float(right.max(0).mean())}


def measure(experiment: Experiment, kept: pathlib.Path, runs: pathlib.Path) -> Found:
  """Of the students at the start and of every run at its end.

  Raises:
    UserError: the workdir of a run is not there.
  """
  found: dict[str, dict[str, dict[str, float]]] = {START: {}}
  rates = results.rates(experiment, grid.tuning_runs(experiment, list(experiment.arms)), kept)
  rates = rates or dict.fromkeys(experiment.arms)
  todo = grid.final_runs(experiment, rates)
  with common.bar(Console()) as bar:
    for run in bar.track(todo, description='runs'):
      seed = str(run.seed)
      if seed not in found[START]:
        found[START][seed] = scores(draws(run.config.student.path, run.config))
      found.setdefault(run.arm, {})[seed] = scores(end(run, runs))
  return found


def end(run: Run, runs: pathlib.Path) -> np.ndarray:
  """`draws` of the last checkpoint of a run."""
  workdir = run.workdir(runs)
  if not workdir.exists():
    raise UserError(
      f'{workdir} is not there: give python -m experiments.run first, on this machine'
    )
  with tempfile.TemporaryDirectory() as folder:
    export.export(str(workdir), folder + '/student')
    return draws(folder + '/student', run.config)


def page(experiment: Experiment, found: Found) -> str:
  """sampled.md."""
  names = list(next(iter(found[START].values())))
  lines = [
    'At temperature 1, four answers a problem, %; mean over seeds with its 95 % t-interval, and '
    'the difference to the reference, paired by seed.',
    '',
    f'| arm | {" | ".join(f"{name} | minus its reference" for name in names)} |',
    f'|---|{"---:|---:|" * len(names)}',
  ]
  of = lambda arm, name: {seed: 100 * each[name] for seed, each in found[arm].items()}
  for arm in found:
    cells = [arm]
    for name in names:
      mean = estimate(list(of(arm, name).values()))
      reference = experiment.reference(arm) if arm != START else START
      gap = paired(of(arm, name), of(reference, name))
      told = f'{gap.mean:+.1f} ± {gap.half:.1f} ({reference})' if reference != arm else '–'
      cells += [f'{mean.mean:.1f} ± {mean.half:.1f}', told]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


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
    json.dump(workers.rounded(found), file, indent=1)
  with workdirs.writing(str(folder / 'sampled.md')) as file:
    file.write(page(experiment, found))
  Console().print(page(experiment, found))


if __name__ == '__main__':
  # The experiment's name is no flag: it is taken off before the flags are read.
  _NAME = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith('-') else ''
  cli.run(main)
