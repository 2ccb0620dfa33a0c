"""Seconds of scoring completions of uneven lengths, and what sorting rows by length gives.

    python -m experiments.benchmarks.score

Two views, as DOPD has them: a random Qwen3 teacher, 8 layers x 512, and student, 4 x 256, read
prompts of 32 tokens and completions of 1 to 992, which are lognormal as those of reasoning models:
most are short and some reach the end. `one_width` is the same without sorting and cutting.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from dopd_jax import microbatches, models, objectives, state, step
from experiments.benchmarks import harness

_ROWS = flags.DEFINE_integer('rows', 64, 'Completions.')
_MICROBATCH = flags.DEFINE_integer('microbatch', 8, 'Rows of a pass.')
_NEW = flags.DEFINE_integer('new', 992, 'Most tokens of a completion.')
_MEDIAN = flags.DEFINE_integer('median', 250, 'Tokens of the middle completion.')
PROMPT, VOCAB = 32, 4096


def main(argv):
  """Scores one batch again and again, and prints the line."""
  del argv
  rng, B, N = np.random.default_rng(0), _ROWS.value, _NEW.value
  lengths = np.clip(_MEDIAN.value * np.exp(0.8 * rng.standard_normal(B)), 1, N).astype(int)
  ids = lambda n: jnp.asarray(rng.integers(0, VOCAB, (B, n)), jnp.int32)
  prompt = step.Prompt(ids(PROMPT), jnp.full(B, PROMPT, jnp.int32))
  mask = jnp.asarray(np.arange(N) < lengths[:, None])
  prompts = {'plain': prompt, 'privileged': prompt}
  batch = step.Batch(prompts, ids(N), mask, mask, jnp.zeros((B, N)))
  student, teacher = (
    models.build(harness.qwen3(layers, width, VOCAB)) for layers, width in ((4, 256), (8, 512))
  )
  objective, tx = objectives.Dopd().build(), optax.sgd(1.0)
  now = state.create(student.init(jax.random.key(0)), tx, objective)
  given = {'teacher': {'': teacher.init(jax.random.key(1))}}
  by_name = {'teacher': {'': teacher}}

  def timed():
    steps = step.make_steps(
      student, by_name, objective, tx,
      live_vocab=VOCAB, microbatch=_MICROBATCH.value, head_tile=256,
    )  # fmt: skip
    return harness.seconds(functools.partial(jax.jit(steps.score), now, given, batch))

  ours = timed()
  microbatches.WIDTHS = 1
  one_width = timed()
  ours |= {
    'one_width_median_s': one_width['median_s'],
    'times_faster': round(one_width['median_s'] / ours['median_s'], 2),
    'mean_length': round(float(lengths.mean())),
    'longest': int(lengths.max()),
  }
  harness.report('score', ours)


if __name__ == '__main__':
  app.run(main)
