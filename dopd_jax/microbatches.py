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


def deal(tree: Any, n: int) -> Any:
  """[B, ...] -> [n, B/n, ...]: row r goes to micro-batch r mod n."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), tree)


def gather(tree: Any, n: int) -> Any:
  """The inverse of `deal`."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(n * x.shape[1], *x.shape[2:]), tree)


def over_micro_batches(fn: Callable, batch: Any, microbatch: int) -> Any:
  """`fn` over micro-batches of at most `microbatch` rows, one after the other."""
  n = micro_batches(count_rows(batch), microbatch)
  return gather(lax.map(fn, deal(batch, n)), n)


def over_rows_by_length(fn: Callable, batch: Any, length: Int[Array, 'B'], microbatch: int) -> Any:
  """As `over_micro_batches`, with rows of about one length side by side; results in the old order.

  Rows stay on their device: each sorts its own b of them, and a micro-batch has a part of each.
  """
  B, shards = count_rows(batch), sharding.shards('data', 'fsdp')
  b, n = B // shards, micro_batches(B, microbatch)
  if n == 1 or B % shards or b % n:
    return over_micro_batches(fn, batch, microbatch)
  by_length = jnp.argsort(length.reshape(shards, b), axis=1, stable=True)
  # Where `deal` looks for the rows of a micro-batch: at every n-th place.
  order = by_length.reshape(shards, n, b // n).swapaxes(1, 2).reshape(shards, b)
  found = over_micro_batches(fn, _take(batch, order), microbatch)
  return _take(found, jnp.argsort(order, axis=1))


def _take(tree: Any, order: Int[Array, 'S b']) -> Any:
  """Rows [S * b, ...] in a new order within each of S shards."""
  keep = sharding.constrain_rows

  def one(x):
    index = order.reshape(*order.shape, *(1 for _ in x.shape[1:]))
    apart = keep(x.reshape(*order.shape, *x.shape[1:]))
    return keep(jnp.take_along_axis(apart, index, axis=1).reshape(x.shape))

  return jax.tree.map(one, tree)


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
