"""Tokens per second of the sampler on a small random Qwen3.

    python -m experiments.benchmarks.sampler --peer='.venv-tunix/bin/python tunix_sampler.py'

Prints one JSON line: tokens and decode steps of a run, median and fastest seconds over the runs,
tokens per second by the median, and the megabytes that XLA takes for temporaries. Without
--mean_length there is no stop id and every row runs to its end; with it lengths are geometric, and
--slots or --at_once say how they share the machine:

    --batch 128 --new 512 --mean_length 64               all rows, until the longest has ended
    --batch 128 --new 512 --mean_length 64 --at_once 32  four batches, each until its longest
    --batch 128 --new 512 --mean_length 64 --slots 32    32 rows, refilled

Absolute times drift with the machine: compare ratios.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags

from dopd_jax.models import build
from dopd_jax.rollout import Sampling
from dopd_jax.rollout.sampler import make_generate
from experiments.benchmarks import harness

_BATCH = flags.DEFINE_integer('batch', 32, 'Prompts.')
_PROMPT = flags.DEFINE_integer('prompt', 32, 'Tokens of each prompt.')
_NEW = flags.DEFINE_integer('new', 128, 'Tokens to sample for each prompt.')
_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Completions of each prompt.')
_VOCAB = flags.DEFINE_integer('vocab', 4096, 'Rows of the embedding table.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 is greedy.')
_TOP_K = flags.DEFINE_integer('top_k', 0, '0 is off.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, '1 is off.')
_MIN_P = flags.DEFINE_float('min_p', 0.0, '0 is off.')
_MEAN = flags.DEFINE_integer('mean_length', 0, 'Tokens that a row has on average; 0 is --new.')
_SLOTS = flags.DEFINE_integer('slots', 0, 'Completions decoded at once, refilled; 0 is all.')
_AT_ONCE = flags.DEFINE_integer('at_once', 0, 'Prompts of a batch, one after the other; 0 is all.')
_KV_CACHE = flags.DEFINE_string('kv_cache', 'compute', 'compute or int8.')
_LAYERS = flags.DEFINE_integer('layers', 4, 'Of the model.')
_WIDTH = flags.DEFINE_integer('width', 256, 'Of the model; heads are 64 wide.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'Of activations and cache.')
_DUMP = flags.DEFINE_string('dump_hlo', None, 'Where to write the optimised HLO, if anywhere.')


def main(argv):
  """Compiles once, runs a few times, prints the line."""
  del argv
  width = _WIDTH.value
  config = harness.qwen3(_LAYERS.value, width, _VOCAB.value)
  sampling = Sampling(
    max_new_tokens=_NEW.value,
    num_samples=_SAMPLES.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    slots=_SLOTS.value,
    kv_cache=_KV_CACHE.value,
  )
  model = build(config, compute_dtype=jnp.dtype(_DTYPE.value))
  # At random weights every id is about as likely.
  stop_ids = range(_VOCAB.value // _MEAN.value if _MEAN.value else 0)
  generate = make_generate(model, sampling, stop_ids=stop_ids, pad_id=0, live_vocab=_VOCAB.value)
  params = jax.jit(model.init)(jax.random.key(0))
  shape = (_BATCH.value, _PROMPT.value)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, _VOCAB.value)
  records = jnp.arange(_BATCH.value)
  rows = _AT_ONCE.value or _BATCH.value
  key = jax.random.key(2)
  batches = [
    (
      params,
      tokens[i : i + rows],
      jnp.ones((rows, _PROMPT.value), bool),
      key,
      records[i : i + rows],
    )
    for i in range(0, _BATCH.value, rows)
  ]

  start = time.perf_counter()
  compiled = jax.jit(generate).lower(*batches[0]).compile()
  compile_s = time.perf_counter() - start
  if _DUMP.value:
    with open(_DUMP.value, 'w') as f:
      f.write(compiled.as_text())

  run = lambda: [compiled(*batch) for batch in batches]
  times = harness.seconds(run)
  done = run()
  count = sum(int(rollout.mask.sum()) for rollout, _ in done)
  ours = {
    **times,
    'tokens': count,
    'longest': max(int(rollout.mask.sum(axis=1).max()) for rollout, _ in done),
    'steps': sum(int(steps) for _, steps in done),
    'compile_s': round(compile_s, 2),
    'tokens_per_s': round(count / times['median_s']),
    'temporary_mb': round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
  }
  harness.report('sampler', ours)


if __name__ == '__main__':
  app.run(main)
