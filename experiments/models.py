"""The models that an experiment starts from, made by supervised training where they are missing."""

import pathlib
import shutil

from rich.console import Console

from dopd_jax import config as configs
from dopd_jax import export
from dopd_jax.errors import UserError
from experiments import common, grid, results, workers
from experiments.grid import Experiment, Run

FOLDER = pathlib.Path('runs/experiments/models')


def wanted(experiment: Experiment) -> dict[pathlib.Path, Run]:
  """Where each model lies in its folder, and the training that makes it."""
  found = {}
  for seed in (*experiment.tuning_seeds, *experiment.seeds):
    for name, config in experiment.models.items():
      path, _, words = config.format(seed=seed).partition(':')
      made = configs.validate(grid.module(grid.ROOT / path).get_config(words))
      # One that is the same for all seeds is named by itself.
      each = '{seed}' in config
      found[pathlib.Path(f'{name}_{seed}' if each else name)] = Run(name, seed if each else 0, made)
  return found


def prepare(
  experiment: Experiment,
  into: workers.Into,
  console: Console,
  folder: pathlib.Path | None = None,
) -> None:
  """Makes the models that are missing: a training with a result file, and the export of its end.

  Args:
    experiment: which models, and of which seeds.
    into: trains runs in folders for results and for workdirs, as `workers.Processes.into` does.
    console: where a bar is shown.
    folder: where models, results and workdirs lie; the experiment's, or else `FOLDER`.

  Raises:
    UserError: a model is there from another config, or its training did not end as it should.
  """
  folder = folder or pathlib.Path(experiment.models_in or FOLDER)
  models = {folder / path: run for path, run in wanted(experiment).items()}
  missing = {path: run for path, run in models.items() if not results.done(run, folder)}
  unexported = [path for path in models if path in missing or not path.exists()]
  if not unexported:
    return
  with common.bar(console) as bar:
    task = bar.add_task('models', total=len(missing))
    for run, _ in into(folder, folder / 'runs')(list(missing.values())):
      bar.advance(task)
      bar.console.print(f'trained {run.name}', highlight=False)
  for path in unexported:
    run = models[path]
    result, goal = results.of(run, folder), run.config.evaluation.stop_at
    if 'stopped' in result:
      raise UserError(f'{path.name} could not be trained: {result["stopped"]}')
    if goal and (reached := results.final(result, experiment.metric)) < goal:
      raise UserError(
        f'{path.name} was to reach {goal:.0%} and ended at {reached:.1%}: give it more steps'
      )
    shutil.rmtree(path, ignore_errors=True)  # of a training that is no more
    export.export(str(run.workdir(folder / 'runs')), str(path))
