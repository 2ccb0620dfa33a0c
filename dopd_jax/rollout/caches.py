"""Caches of the sampler: `models.Cache` of the prompts made into that of completions.

Arrays are k and v [L, B, S, K, H], and where those are int8 their scales [L, B, S, K].
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

# Columns below which a cache isn't worth growing: each growth compiles another loop.
_SHORTEST = 256


def lengths(P: int, N: int) -> list[int]:
  """Columns that the cache grows to, one loop each: a step reads all columns, written or not.

  Each length is twice the one before. To grow is to copy the cache once, and for that moment the
  old one stands beside the new: half as much memory again at the last.
  """
  lengths = [P + N - 1]  # the last token is drawn and never fed
  while lengths[0] // 2 >= max(P + 1, _SHORTEST):
    lengths.insert(0, lengths[0] // 2)
  return lengths


def repeat(cache: Any, M: int) -> Any:
  """The cache of each prompt for its M completions."""
  if M == 1:
    return cache
  return cache._replace(
    **{name: jnp.repeat(x, M, axis=1) for name, x in _stored(cache).items()},
    valid=jnp.repeat(cache.valid, M, axis=0),
    position=jnp.repeat(cache.position, M, axis=0),
  )


def grow(cache: Any, length: int) -> Any:
  """The cache with `length` columns, the new ones empty."""
  more = length - cache.valid.shape[1]
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more)) + ((0, 0),) * (x.ndim - 3))
  return cache._replace(
    **{name: pad(x) for name, x in _stored(cache).items()},
    valid=jnp.pad(cache.valid, ((0, 0), (0, more))),
  )


def empty_rows(cache: Any, rows: int) -> Any:
  """A cache of as many columns and other rows, with nothing in it."""
  empty = lambda x: jnp.zeros((x.shape[0], rows, *x.shape[2:]), x.dtype)
  return cache._replace(
    **{name: empty(x) for name, x in _stored(cache).items()},
    valid=jnp.zeros((rows, cache.valid.shape[1]), bool),
    position=jnp.zeros((rows,), cache.position.dtype),
  )


def put_row(cache: Any, row: Int[Array, ''], prompts: Any, prompt: Int[Array, '']) -> Any:
  """The cache with one row of `prompts`, which has no more columns; no other column is valid."""
  old, new = _stored(cache), _stored(prompts)

  def put(x, y):
    y = lax.dynamic_slice_in_dim(y, prompt, 1, axis=1)
    return lax.dynamic_update_slice(x, y, (0, row) + (0,) * (x.ndim - 2))

  valid = prompts.valid[prompt]
  valid = jnp.pad(valid, (0, cache.valid.shape[1] - valid.shape[0]))
  return cache._replace(
    **{name: put(old[name], new[name]) for name in old},
    valid=lax.dynamic_update_slice(cache.valid, valid[None], (row, 0)),
    position=cache.position.at[row].set(prompts.position[prompt]),
  )


def _stored(cache: Any) -> dict[str, Array]:
  fields = cache._asdict()
  names = ('k', 'v', 'k_scale', 'v_scale')
  return {name: fields[name] for name in names if fields.get(name) is not None}
