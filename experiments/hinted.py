r"""How right are the models of an experiment when they see a hint, before any distillation?

  python -m experiments.hinted image_hints    # writes hinted.json and hinted.md in its folder

Asked for each kind of hint that its arms show: teacher and students answer the held-out problems of
the final runs, greedily, with the hint in the prompt as the privileged policies see it, and without
any; a picture stays as the student sees it. The models must be there: `experiments.run` makes them.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping

import jax
from rich.console import Console

from dopd_jax import cli, diagnose, evaluation, metrics, policies, sharding, workdirs
from dopd_jax.config import Config, Policy
from dopd_jax.errors import UserError
from dopd_jax.rollout import Sampling
from experiments import common, grid, workers
from experiments.grid import Experiment

NONE = 'none'


def asked(experiment: Experiment) -> dict[str, tuple[Config, bool]]:
  """Kind of hint -> a config that shows it in `data.eval`, and whether it is left out: `NONE`."""
  found: dict[str, tuple[Config, bool]] = {}
  for arm in experiment.arms:
    config = grid.make_config(experiment, arm, experiment.seeds[0])
    if config.data.privileged == 'column' and 'privileged' in config.objective.build().contexts:
      kind = re.search(r'\bhint=([^&]+)', config.data.eval)
      found.setdefault(NONE, (config, True))
      found.setdefault(kind[1] if kind else "the task's own", (config, False))
  return found


def models(experiment: Experiment) -> list[str]:
  """The paths of the teachers and students of its final runs, each once."""
  configs = [
    grid.make_config(experiment, arm, seed) for seed in experiment.seeds for arm in experiment.arms
  ]
  teachers = [config.teacher.path for config in configs]
  return list(dict.fromkeys([*teachers, *(config.student.path for config in configs)]))


def accuracy(path: str, config: Config, plain: bool) -> float:
  """The share of `config.data.eval` that a model answers right.

  Args:
    path: of the model.
    config: of a run.
    plain: whether the hint is left out.

  Raises:
    UserError: the model cannot be read.
  """
  data = dataclasses.replace(config.data, train=config.data.eval)
  config = dataclasses.replace(config, data=data, student=Policy(path=path))
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])  # tiny models
  with jax.set_mesh(mesh), metrics.bar(Console(stderr=True)) as progress:
    pair = policies.load_pair(config, mesh, set())
    examples, _ = diagnose.read_examples(config, pair)
    if not plain:
      examples = [dataclasses.replace(e, prompt_ids=e.privileged_ids) for e in examples]
    judge = evaluation.Judge(examples, pair, mesh, config.microbatch, config.data.prompt_bucket)
    sampling = Sampling(max_new_tokens=config.rollout.max_new_tokens, temperature=0.0)
    generate = evaluation.make_generate(pair.student.model, sampling, pair)
    return judge.accuracy('accuracy', generate, pair.student.params, progress)[0]['accuracy']


def measure(experiment: Experiment) -> Iterator[tuple[str, dict[str, float]]]:
  """Kind of hint, and model -> accuracy."""
  for kind, (config, plain) in asked(experiment).items():
    paths = models(experiment)
    yield kind, {pathlib.Path(path).name: accuracy(path, config, plain) for path in paths}


def page(found: Mapping[str, Mapping[str, float]]) -> str:
  """hinted.md."""
  names = list(found[NONE])
  lines = [
    'Right with the hint in the prompt, before any distillation, %.',
    '',
    f'| hint | {" | ".join(names)} |',
    f'|---|{"---:|" * len(names)}',
  ]
  for kind, shares in found.items():
    lines.append(f'| {kind} | {" | ".join(f"{100 * shares[name]:.1f}" for name in names)} |')
  return '\n'.join(lines) + '\n'


def main() -> None:
  """The command."""
  if not _NAME:
    raise UserError('name an experiment first: python -m experiments.hinted NAME')
  experiment, folder = grid.load(_NAME), pathlib.Path('experiments', _NAME)
  if not asked(experiment):
    raise UserError(f'{_NAME} shows no hint: name an experiment that does')
  common.end_by_interrupt()
  found = dict(measure(experiment))
  with workdirs.writing(str(folder / 'hinted.json')) as file:
    json.dump(workers.rounded(found), file, indent=1)
  with workdirs.writing(str(folder / 'hinted.md')) as file:
    file.write(page(found))
  Console().print(page(found))


if __name__ == '__main__':
  # The experiment's name is no flag: it is taken off before the flags are read.
  _NAME = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith('-') else ''
  cli.run(main)
