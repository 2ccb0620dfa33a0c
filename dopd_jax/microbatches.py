"""The rows of a batch in parts that fit the memory, each part as wide as its longest row.

Rows are dealt to micro-batches like cards, so that each device keeps its own. Where nothing is
differentiated, rows of about one length can meet in a micro-batch (`by_length`), which is then cut
to what they need (`at_width`): a long completion makes its own micro-batch slow, not all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dopd_jax import sharding
from dopd_jax.config import micro_batches

WIDTHS = 4  # programs of one trunk: a row pays for at most a quarter too much
LANES = 128  # widths are multiples: smaller steps would only pad within a TPU's registers


def count_rows(tree: Any) -> int:
  """B of a tree of arrays [B, ...]."""
  return jax.tree.leaves(tree)[0].shape[0]


def part(tree: Any, n: int, m: Int[Array, '']) -> Any:
  """[B, ...] -> [B/n, ...]: micro-batch m of n, which has the rows r with r mod n = m."""
  return jax.tree.map(lambda x: lax.dynamic_index_in_dim(_dealt(x, n), m, 1, keepdims=False), tree)


def gather(tree: Any, n: int) -> Any:
  """[n, B/n, ...] -> [B, ...]: the rows of all parts in their old order."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(n * x.shape[1], *x.shape[2:]), tree)


def over_micro_batches(fn: Callable, batch: Any, microbatch: int) -> Any:
  """`fn` over micro-batches of at most `microbatch` rows, one after the other."""
  n = micro_batches(count_rows(batch), microbatch)

  def write(x, new, m):
    return lax.dynamic_update_index_in_dim(_dealt(x, n), new, m, 1).reshape(x.shape)

  return _one_by_one(fn, n, n * (count_rows(batch) // n), lambda m: part(batch, n, m), write)


def over_rows_by_length(fn: Callable, batch: Any, length: Int[Array, 'B'], microbatch: int) -> Any:
  """As `over_micro_batches`, with rows of about one length side by side; results in the old order.

  Rows stay on their device: each sorts its own b of them, and a micro-batch has a part of each.
  """
  B, shards = count_rows(batch), sharding.shards('data', 'fsdp')
  b, n = B // shards, micro_batches(B, microbatch)
  if n == 1 or B % shards or b % n:
    return over_micro_batches(fn, batch, microbatch)
  by_length = jnp.argsort(length.reshape(shards, b), axis=1, stable=True)
  mine = by_length.reshape(shards, n, b // n)
  of_device = lambda x: sharding.constrain_rows(x.reshape(shards, -1, *x.shape[1:]))
  flat = lambda x: sharding.constrain_rows(x.reshape(-1, *x.shape[2:]))

  def read(m):
    take = jax.vmap(lambda x, rows: x[rows])
    return jax.tree.map(lambda x: flat(take(of_device(x), mine[:, m])), batch)

  def write(x, new, m):
    put = jax.vmap(lambda x, rows, new: x.at[rows].set(new, unique_indices=True))
    return flat(put(of_device(x), mine[:, m], of_device(new)))

  return _one_by_one(fn, n, B, read, write)


def _dealt(x: Array, n: int) -> Array:
  return x.reshape(x.shape[0] // n, n, *x.shape[1:])


def _one_by_one(fn: Callable, n: int, B: int, read: Callable, write: Callable) -> Any:
  """Results [B, ...] of `fn` on n parts; hidden states are large, so they are written in place.

  `read(m)` is a part, and `write(whole, new, m)` puts its results in their rows.
  """
  one = jax.eval_shape(lambda: fn(read(0)))
  empty = lambda x: sharding.constrain_rows(jnp.zeros((B, *x.shape[1:]), x.dtype))

  def step(m, whole):
    return jax.tree.map(lambda x, new: write(x, new, m), whole, fn(read(m)))

  return lax.fori_loop(0, n, step, jax.tree.map(empty, one))


def widths(T: int) -> tuple[int, ...]:
  """The widths that rows of T columns may be cut to, rising; the last is T."""
  some = {min(T, -(-T * k // (WIDTHS * LANES)) * LANES) for k in range(1, WIDTHS)}
  return tuple(sorted(some | {T}))


def at_width(fn: Callable[[int], Any], T: int, longest: Int[Array, '']) -> Any:
  """fn(width) for the least width of `widths(T)` that holds `longest`, chosen on the device.

  `fn` gives the same shapes for every width. Not to be differentiated: what the backward pass needs
  would be kept for all widths.
  """
  choices = widths(T)
  index = jnp.searchsorted(jnp.array(choices), longest)
  return lax.switch(index, [lambda w=w: fn(w) for w in choices])
