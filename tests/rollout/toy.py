"""Two models small enough to know by heart, behind the same protocol as the decoder."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Cache(NamedTuple):
  k: jnp.ndarray
  v: jnp.ndarray
  valid: jnp.ndarray
  index: jnp.ndarray
  position: jnp.ndarray


class Model(NamedTuple):
  forward: object
  init_cache: object
  head: object


def init_cache(batch, length):
  return Cache(
    k=jnp.zeros((1, batch, length, 1, 1)),
    v=jnp.zeros((1, batch, length, 1, 1)),
    valid=jnp.zeros((batch, length), bool),
    index=jnp.int32(0),
    position=jnp.zeros(batch, jnp.int32),
  )


def markov():
  """The next token's logits are a row of a table [V, V]: `params[token]`."""

  def forward(params, tokens, valid, cache=None):
    del valid
    return params[tokens], cache._replace(index=cache.index + tokens.shape[1])

  return Model(forward, init_cache, lambda params: jnp.eye(params.shape[0]))


def script(rows, V):
  """(model, params, prompts): row r writes rows[r] with certainty, each token from the one before.

  Prompts are two tokens long, the second being the row's own; a token is followed by one other.
  """
  table = np.full((V, V), -1e4, np.float32)
  prompts = []
  for r, row in enumerate(rows):
    own = V - 1 - r
    assert len({own, *row}) == len(row) + 1
    prompts.append([0, own])
    for before, after in zip([own, *row], row):
      table[before, after] = 0
  return markov(), jnp.asarray(table), jnp.asarray(prompts, jnp.int32)


def pad_prompts(prompts, bucket, pad_id):
  """Prompts padded on the left to a multiple of the bucket: tokens [b, P] and valid [b, P]."""
  P = -(-max(map(len, prompts)) // bucket) * bucket
  tokens = np.full((len(prompts), P), pad_id, np.int32)
  valid = np.zeros((len(prompts), P), bool)
  for row, prompt in enumerate(prompts):
    tokens[row, P - len(prompt) :] = prompt
    valid[row, P - len(prompt) :] = True
  return tokens, valid
