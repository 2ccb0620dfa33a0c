"""The training command with something wrong in its process from one step on.

  python -m experiments.faults.inject FAULT STEP --config=... --workdir=...

nan_in_batch      the sampler's log-prob of one token of the batch is NaN
nan_in_weight     one number of the student is NaN
nan_in_teacher    one number of the teacher is NaN
clock_back        the wall clock goes back by a day, and forth again ten steps later
clock_forward     the wall clock goes forth by a day, and back again ten steps later
"""

import sys
import time

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from dopd_jax import cli, collect, train

DAY = 86_400.0


def poison(array):
  """The array with a NaN as its first number, where it was."""
  changed = array.at[(0,) * array.ndim].set(jnp.nan)
  return jax.device_put(changed, array.sharding)


def poison_model(params):
  """The parameters with a NaN in the last norm, which every token passes."""
  return {**params, 'final_norm': jax.tree.map(poison, params['final_norm'])}


def at_steps(fault: str, step: int) -> None:
  """Puts the fault into the parts of the trainer."""
  take, compile_steps, now = collect.Ahead.take, train.compile_steps, time.time

  def taken(self, params, number):
    if fault.startswith('clock'):
      shift = DAY if fault == 'clock_forward' else -DAY
      time.time = lambda: now() + (shift if step <= number < step + 10 else 0.0)
    found = take(self, params, number)
    if fault == 'nan_in_batch' and number == step:
      found = found._replace(batch=found.batch._replace(logp=poison(found.batch.logp)))
    return found

  def compiled(*args):
    steps = compile_steps(*args)

    def score(state, given, batch, resident):
      if fault == 'nan_in_teacher' and int(state.step) + 1 == step:
        given = {**given, 'teacher': {'': poison_model(given['teacher'][''])}}
      return steps.score(state, given, batch, resident)

    def update(state, resident, batch, scored):
      if fault == 'nan_in_weight' and int(state.step) + 1 == step:
        state = state._replace(params=poison_model(state.params))
      return steps.update(state, resident, batch, scored)

    return steps._replace(score=score, update=update)

  collect.Ahead.take, train.compile_steps = taken, compiled


if __name__ == '__main__':
  at_steps(sys.argv.pop(1), int(sys.argv.pop(1)))
  train._CONFIG = config_flags.DEFINE_config_file('config', None, 'What to run.')
  flags.DEFINE_string('workdir', None, 'Where the run lives.')
  cli.run(train.main)
