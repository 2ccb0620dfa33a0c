"""Seconds of causal attention forward and backward: the model's own against jax.nn's forms.

    python -m experiments.benchmarks.attention                               # ours beside xla
    python -m experiments.benchmarks.attention --others=xla,cudnn --dtype=bfloat16    # on a GPU

Shapes are those of Qwen3-1.7B by default. `*_over_ours` below 1 means that the other is faster.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from dopd_jax.models import layers
from experiments.benchmarks import harness

_ROWS = flags.DEFINE_integer('rows', 2, 'Rows of a batch.')
_TOKENS = flags.DEFINE_integer('tokens', 1024, 'Tokens of a row.')
_HEADS = flags.DEFINE_integer('heads', 16, 'Query heads.')
_KEYS = flags.DEFINE_integer('keys', 8, 'Key heads.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'Of queries, keys and values.')
_OTHERS = flags.DEFINE_list('others', ['xla'], 'Implementations of jax.nn.dot_product_attention.')
WIDTH = 128


def main(argv):
  """Times each and prints the line."""
  del argv
  B, T = _ROWS.value, _TOKENS.value
  keys = jax.random.split(jax.random.key(0), 3)
  make = lambda key, heads: jax.random.normal(key, (B, T, heads, WIDTH), _DTYPE.value)
  args = [make(key, n) for key, n in zip(keys, (_HEADS.value, _KEYS.value, _KEYS.value))]
  causal = jnp.broadcast_to(jnp.tri(T, dtype=bool), (B, T, T))

  def timed(fn):
    total = lambda q, k, v: jnp.sum(fn(q, k, v).astype(jnp.float32) ** 2)
    run = jax.jit(jax.grad(total, (0, 1, 2)))
    return harness.seconds(lambda: run(*args))

  def other(implementation):
    return lambda q, k, v: jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation=implementation
    )

  ours = timed(lambda q, k, v: layers.attention(q, k, v, causal))
  for name in _OTHERS.value:
    found = timed(other(name))
    ours[f'{name}_median_s'] = found['median_s']
    ours[f'{name}_over_ours'] = round(found['median_s'] / ours['median_s'], 3)
  harness.report('attention', ours)


if __name__ == '__main__':
  app.run(main)
