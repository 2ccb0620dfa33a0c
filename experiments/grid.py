"""What an experiment declares, and the runs that it takes.

Experiment   a question, a base config, arms, seeds, one grid of learning rates for every arm
Run          one cell of the grid with its validated config
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dopd_jax import config as configs
from dopd_jax.config import Config
from dopd_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
RATE = 'optimizer.learning_rate'
QUICK = 3  # steps at most of a quick run


@dataclasses.dataclass(frozen=True)
class Arm:
  """One of the things compared: words for the base config's argument, and dotted changes."""

  arg: str = ''
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A comparison, fixed before it runs.

  Raises:
    UserError: no arms or seeds, a name that cannot be part of a file's, seeds that are used twice,
      or a contrast of an arm that is not there.
  """

  question: str
  base: str  # a config file, from the repository's root; its argument must take seed=K and smoke
  arms: Mapping[str, Arm]  # the first is the reference, but where `references` names another
  seeds: Sequence[int] = (0, 1, 2)
  learning_rates: Sequence[float] = ()  # one grid for every arm; empty: the base's rate, no tuning
  tuning_seeds: Sequence[int] = ()
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for all runs
  # For the tuning runs only: another held-out set, so that the test set never chooses.
  tuning_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tuning_arg: str = ''  # words for the base config's argument, to the same end
  metric: str = 'eval/accuracy'  # higher is better; its last value is what is compared
  references: Mapping[str, str] = dataclasses.field(default_factory=dict)  # arm -> its own
  also: Sequence[str] = ()  # other metrics whose last values are shown beside it and drawn
  looks: Sequence[int] = ()  # steps at which those are tabulated, and what was forgotten since
  contrasts: Sequence[tuple[str, str]] = ()  # (arm, reference): those that are tested
  # Name -> the supervised config that makes the model, one a seed where it names {seed}.
  models: Mapping[str, str] = dataclasses.field(default_factory=dict)
  models_in: str = ''  # their folder, which the base's argument then takes as models=FOLDER
  pool: str = ''  # the experiment whose folder keeps the results; arms of one name are one there

  def __post_init__(self):
    if not self.arms or not self.seeds:
      raise UserError('an experiment needs at least one arm and one seed')
    if bad := [name for name in self.arms if not re.fullmatch(r'\w[\w-]*', name)]:
      raise UserError(f'arm {bad[0]!r} must be named by letters, digits, _ and - only')
    if bool(self.learning_rates) != bool(self.tuning_seeds):
      raise UserError('learning_rates and tuning_seeds go together: set both or neither')
    for name, pairs in (('contrasts', self.contrasts), ('references', self.references.items())):
      for arm in (arm for pair in pairs for arm in pair):
        if arm not in self.arms:
          raise UserError(configs.unknown(f'arm in {name}', arm, self.arms))
    seeds = [*self.seeds, *self.tuning_seeds]
    if len(set(seeds)) < len(seeds):
      raise UserError(f'seeds and tuning_seeds must all differ, not {seeds}')

  def reference(self, arm: str) -> str:
    """The arm that this one is held against; itself for the first."""
    return self.references.get(arm, next(iter(self.arms)))


@dataclasses.dataclass(frozen=True)
class Run:
  """One cell."""

  arm: str
  seed: int
  config: Config
  tuning: bool = False

  @property
  def learning_rate(self) -> float:
    """The rate at its peak."""
    return self.config.optimizer.learning_rate

  @property
  def name(self) -> str:
    """As in file names."""
    rate = f'.lr{self.learning_rate:g}' if self.tuning else ''
    return f'{self.arm}{rate}.seed{self.seed}'

  @property
  def config_hash(self) -> str:
    """SHA-256 of the validated config, in hexadecimal."""
    return hashlib.sha256(configs.to_json(self.config).encode()).hexdigest()

  def file(self, out: pathlib.Path) -> pathlib.Path:
    """Where its result lies."""
    return out / ('tuning' if self.tuning else 'results') / f'{self.name}.json'

  def workdir(self, runs: pathlib.Path) -> pathlib.Path:
    """Where it trains; another config never meets the files of this one."""
    kind = 'tuning' if self.tuning else 'results'
    return runs / kind / f'{self.name}-{self.config_hash[:8]}'


def names() -> list[str]:
  """All that are declared; those with contrasts named beforehand come first."""
  found = sorted(p.parent.name for p in (ROOT / 'experiments').glob('*/experiment.py'))
  return sorted(found, key=lambda name: not load(name).contrasts)


def load(name: str) -> Experiment:
  """The experiment of `experiments/NAME/experiment.py`; raises `UserError` if there is none."""
  path = ROOT / 'experiments' / name / 'experiment.py'
  if not path.exists():
    raise UserError(configs.unknown('experiment', name, [*names(), 'all']))
  return module(path).EXPERIMENT


def make_config(
  experiment: Experiment,
  arm: str,
  seed: int,
  rate: float | None = None,
  *,
  tuning: bool = False,
  quick: bool = False,
) -> Config:
  """The validated config of a cell; raises `UserError` for a change that the config has no key for.

  Later ones win: the base, the experiment's changes, the arm's, the tuning's, the rate. In a quick
  run, settings that the base's `smoke` makes small stay small.
  """
  path = ROOT / experiment.base
  if not path.exists():
    raise UserError(f'there is no base config {experiment.base}: name it from the repository root')
  get_config = module(path).get_config
  tuned = experiment.tuning_arg if tuning else ''
  where = f'models={experiment.models_in}' if experiment.models_in else ''
  words = (experiment.arms[arm].arg, tuned, where, f'seed={seed}')
  words = ','.join(word for word in words if word)
  cfg = get_config(words)
  changes = {**experiment.changes, **experiment.arms[arm].changes}
  if tuning:
    changes |= experiment.tuning_changes
  if rate is not None:
    changes[RATE] = rate
  try:
    if quick:
      full, cfg = cfg, get_config(f'{words},smoke')
      if cfg.steps > QUICK:  # the base is a smoke run itself
        cfg.steps, cfg.optimizer.warmup_steps, cfg.evaluation.records = QUICK, 0, 16
        cfg.rollout.prompts, cfg.microbatch = 4, 16
        cfg.data.train, cfg.data.eval = (
          re.sub(r'\bsize=\d+', 'size=64', source) for source in (cfg.data.train, cfg.data.eval)
        )
      changes = {k: v for k, v in changes.items() if _get(full, k) == _get(cfg, k)}
    cfg.update_from_flattened_dict(changes)
    return configs.validate(cfg)
  except (UserError, AttributeError, KeyError, TypeError) as error:
    sentence = ' '.join(str(error.args[0] if error.args else error).split())
    raise UserError(f'arm {arm!r}: {sentence}') from error


def tuning_runs(experiment: Experiment, arms: Sequence[str]) -> list[Run]:
  """Every arm at every rate, on the tuning seeds."""
  return [
    Run(arm, seed, make_config(experiment, arm, seed, rate, tuning=True), tuning=True)
    for seed in experiment.tuning_seeds
    for arm in arms
    for rate in experiment.learning_rates
  ]


def final_runs(experiment: Experiment, rates: Mapping[str, float | None], quick=False) -> list[Run]:
  """Every arm of `rates` at its rate (None: the base's), on the seeds; the first only if quick."""
  return [
    Run(arm, seed, make_config(experiment, arm, seed, rate, quick=quick))
    for seed in experiment.seeds[: 1 if quick else None]
    for arm, rate in rates.items()
  ]


def _get(cfg: Any, dotted: str) -> Any:
  for part in dotted.split('.'):
    cfg = cfg[part]
  return cfg


def module(path: pathlib.Path) -> Any:
  """What a Python file defines, by its path."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found
