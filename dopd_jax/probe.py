"""What a look measures beside accuracy, the same for every method, so that they can be compared."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from dopd_jax import collate, teachers
from dopd_jax.config import Config
from dopd_jax.objectives import Compare, Objective, View, one_regime
from dopd_jax.policies import Pair
from dopd_jax.step import Batch, Steps, make_steps


def weights(config: Config, objective: Objective) -> frozenset[str]:
  """Whose weights a run loads: the objective's, and the teacher's where a look is held to it."""
  held_out = config.data.eval or config.data.evals
  looks = config.evaluation.teacher and held_out and config.teacher.path
  return objective.weights | ({'teacher'} if looks else set())


def make_probe(
  config: Config, pair: Pair, objective: Objective, steps: Steps
) -> Callable[..., dict[str, float]]:
  """(state, given, resident, batch) -> numbers of the student as it is, on a batch's completions.

  They are the seconds that `steps.score` takes for the batch, and, where one teacher is loaded and
  the plain prompts are there, the student's divergences from the plain teacher both ways.
  """
  T = objective.temperature
  against_teacher = Objective(
    name='probe',
    student=View('student'),
    views={'S': View('student'), 'T': View('teacher')},
    pairs={
      'reverse_kl': Compare('S', 'T', 'reverse_kl'),
      'forward_kl': Compare('S', 'T', 'forward_kl'),
    },
    regimes=('all',),
    rules=((),),
    router=lambda seen: one_regime(seen)._replace(token=seen.pairs),
    temperature=T,
  )
  comparable = '' in pair.given.get('teacher', {}) and 'plain' in objective.prompts
  if comparable:
    steps_to_compare = make_steps(
      pair.student.model,
      pair.models,
      against_teacher,
      optax.identity(),
      live_vocab=len(pair.tokenizer),
      microbatch=config.microbatch,
      head_tile=config.head_tile,
      banned_ids=pair.banned_ids,
    )
    compare = teachers.compiled(steps_to_compare.score, pair.given)

  def probe(state: Any, given: Any, resident: Any, batch: Batch) -> dict[str, float]:
    start = time.monotonic()
    jax.block_until_ready(steps.score(state, given, batch, resident))
    values = {'time/score_seconds': time.monotonic() - start}
    if comparable:
      found = compare(state, given, batch._replace(teacher_rows=None), resident)
      token, mask = collate.fetch((found.plan.token, batch.mask))
      for name, value in token.items():
        values[f'eval/{name}'] = float(value[mask].mean(dtype=np.float64)) if mask.any() else 0.0
    return values

  return probe
