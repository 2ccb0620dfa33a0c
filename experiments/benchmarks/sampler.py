"""Tokens per second of the sampler on a small random Qwen3.

    JAX_PLATFORMS=cpu python experiments/benchmarks/sampler.py

Prints one JSON line: tokens and decode steps of a run, median and fastest seconds over the runs,
tokens per second by the median, and the megabytes that XLA takes for temporaries. There is no stop
id, so that every row runs to its end. Absolute times drift with the machine: compare ratios.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from dopd_jax.models import DecoderConfig, build
from dopd_jax.rollout import Sampling
from dopd_jax.rollout.sampler import make_generate

_BATCH = flags.DEFINE_integer('batch', 32, 'Prompts.')
_PROMPT = flags.DEFINE_integer('prompt', 32, 'Tokens of each prompt.')
_NEW = flags.DEFINE_integer('new', 128, 'Tokens to sample for each prompt.')
_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Completions of each prompt.')
_VOCAB = flags.DEFINE_integer('vocab', 4096, 'Rows of the embedding table.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 is greedy.')
_TOP_K = flags.DEFINE_integer('top_k', 0, '0 is off.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, '1 is off.')
_MIN_P = flags.DEFINE_float('min_p', 0.0, '0 is off.')
_RUNS = flags.DEFINE_integer('runs', 7, 'Timed runs, after one that compiles.')
_DUMP = flags.DEFINE_string('dump_hlo', None, 'Where to write the optimised HLO, if anywhere.')


def main(argv):
  """Compiles once, runs a few times, prints the line."""
  del argv
  config = DecoderConfig(
    vocab_size=_VOCAB.value,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=1_000_000.0,
  )
  sampling = Sampling(
    max_new_tokens=_NEW.value,
    num_samples=_SAMPLES.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
  )
  model = build(config)
  generate = make_generate(model, sampling, stop_ids=(), pad_id=0, live_vocab=_VOCAB.value)
  params = jax.jit(model.init)(jax.random.key(0))
  shape = (_BATCH.value, _PROMPT.value)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, _VOCAB.value)
  records = jnp.arange(_BATCH.value)
  arguments = (params, tokens, jnp.ones(shape, bool), jax.random.key(2), records)

  start = time.perf_counter()
  compiled = jax.jit(generate).lower(*arguments).compile()
  compile_s = time.perf_counter() - start
  if _DUMP.value:
    with open(_DUMP.value, 'w') as f:
      f.write(compiled.as_text())

  seconds = []
  for _ in range(_RUNS.value + 1):
    start = time.perf_counter()
    rollout, steps = jax.block_until_ready(compiled(*arguments))
    seconds.append(time.perf_counter() - start)
  seconds = seconds[1:]
  count = int(rollout.mask.sum())
  result = {
    'tokens': count,
    'steps': int(steps),
    'compile_s': round(compile_s, 2),
    'median_s': round(statistics.median(seconds), 4),
    'fastest_s': round(min(seconds), 4),
    'tokens_per_s': round(count / statistics.median(seconds)),
    'temporary_mb': round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
    'device': jax.devices()[0].device_kind,
  }
  print(json.dumps(result))


if __name__ == '__main__':
  app.run(main)
