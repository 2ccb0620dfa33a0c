"""The text study: what its experiments share. An arm is one run, however many tables show it.

Every arm starts from the same students, sees the same prompts and is tuned on the same grid, on two
students that appear in no final run and on problems of the training split.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.grid import Arm, Experiment

BASE = 'configs/study.py'
# Two pools, each with its own models: `text` has ten students and the primary contrasts, the other
# three, which are kept with its results, so that it goes on anywhere with the very same.
TEXT = 'text'
EXPLORATORY = 'exploratory'
KEPT = f'experiments/{EXPLORATORY}/models'
PRIVILEGED = {'objective.teacher_context': 'privileged'}
MODELS = {
  'teacher': 'configs/study_sft.py:model=teacher',
  'student': 'configs/study_sft.py:model=student,seed={seed}',
}

# Arms of more than one table.
OPD = Arm('method=opd')
OPD_PRIVILEGED = Arm('method=opd', PRIVILEGED)
DOPD = Arm('method=dopd')
# JS to the hinted teacher on every token alike: DOPD without routing, weights or a second source.
UNIFORM_JS = Arm('method=opd', PRIVILEGED | {'objective.divergence': 'js'})
HINT_ROUTING = Arm('method=hint_routing')
# What `repairs` proposes, on text and on images.
HS_TO_TEACHER = {'objective.HS.source': 'teacher'}


def study(
  question: str,
  arms: Mapping[str, Arm],
  *,
  pool: str = EXPLORATORY,
  seeds: Sequence[int] = (0, 1, 2),
  models: Mapping[str, str] = MODELS,
  **more: Any,
) -> Experiment:
  """An experiment of a pool; exploratory unless it names `contrasts`."""
  return Experiment(
    question=question,
    base=BASE,
    arms=arms,
    models=models,
    models_in=KEPT if pool == EXPLORATORY else '',
    seeds=seeds,
    learning_rates=(2e-4, 5e-4, 1e-3),
    tuning_seeds=(100, 101),
    tuning_arg='tuning',
    pool=pool,
    **more,
  )


def cells(**changes: str) -> dict[str, str]:
  """Settings of DOPD's cells: cells(HT_divergence='reverse_kl')."""
  return {f'objective.{name.replace("_", ".", 1)}': value for name, value in changes.items()}
