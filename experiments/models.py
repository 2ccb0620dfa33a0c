"""The models that an experiment starts from, made by supervised training where they are missing."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent import futures

from rich.console import Console

from dopd_jax.errors import UserError
from experiments import common
from experiments.grid import ROOT, Experiment


def prepare(experiment: Experiment, jobs: int, console: Console) -> None:
  """Makes the models that the runs start from and that are not there yet."""
  missing = {k: v for k, v in wanted(experiment).items() if not pathlib.Path(k).exists()}
  if not missing:
    return
  with common.bar(console) as bar:
    task = bar.add_task('models', total=len(missing))
    for path in make(missing, jobs):
      bar.advance(task)
      bar.console.print(f'made {path}', highlight=False, soft_wrap=True)


def wanted(experiment: Experiment) -> dict[str, str]:
  """Directory -> the config that makes its model, of every seed of the experiment."""
  return {
    path.format(seed=seed): config.format(seed=seed)
    for seed in (*experiment.tuning_seeds, *experiment.seeds)
    for path, config in experiment.models.items()
  }


def make(missing: Mapping[str, str], jobs: int) -> Iterator[str]:
  """Makes the models, `jobs` at a time, and gives each directory when it is there.

  A directory PATH is exported from the workdir PATH.run, from which a training that was cut off
  goes on; what it printed is in PATH.log.

  Raises:
    UserError: a training failed.
  """
  running: set[subprocess.Popen] = set()

  def one(path: str, config: str) -> str:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    here = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}
    for words in (
      ('sft', f'--config={ROOT / config}', f'--workdir={path}.run'),
      ('export', f'--workdir={path}.run', f'--out={path}'),
    ):
      command = [sys.executable, '-m', f'dopd_jax.{words[0]}', *words[1:]]
      with open(f'{path}.log', 'a') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=here)
        running.add(process)
        code = process.wait()
        running.discard(process)
      if code:
        raise UserError(f'{path} could not be made (exit code {code}): see {path}.log')
    return path

  with futures.ThreadPoolExecutor(jobs) as pool:
    try:
      made = [pool.submit(one, path, config) for path, config in missing.items()]
      for future in futures.as_completed(made):
        yield future.result()
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      for process in list(running):
        process.terminate()  # it saves its state first
      raise
