"""Reductions over the vocabulary of a tile of rows: whole, by blocks of columns, or over devices.

A rule asks for log-sum-exps, sums and the K-th largest of what it computes from a block; it need
not know whether the block is the whole vocabulary. So one description of a rule serves a tile whose
logits are all there, one that streams over the vocabulary, and one whose columns are split over an
axis of the mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_ID_BITS = 24  # no vocabulary has 16 million ids


class Block(NamedTuple):
  """J columns of the logits of C rows, divided by the temperature, float32, and their ids.

  `made_again`: these logits are computed anew in every pass, and may be rounded otherwise then.
  """

  student: Float[Array, 'C J']
  source: Float[Array, 'C J'] | None
  ids: Int[Array, 'J']
  made_again: bool = False


class Columns(NamedTuple):
  """The vocabulary of C rows as `count` blocks, `block(0)` to `block(count - 1)`.

  `axis`: the mesh axis over which the columns are split, inside `shard_map`; '' for none. Every
  reduction is float32 and the same on all devices of the axis.
  """

  block: Callable[[Any], Block]
  count: int = 1
  axis: str = ''

  def log_sum_exp(self, of: Callable[[Block], Float[Array, 'C J']]) -> Float[Array, 'C']:
    """`log sum_j exp(of)`, -inf where every term is -inf."""

    def part(block):
      x = of(block)
      peak = jnp.max(x, axis=-1)
      return peak, jnp.sum(jnp.exp(x - _finite(peak)[:, None]), axis=-1)

    def join(a, b):
      peak = jnp.maximum(a[0], b[0])
      return peak, sum(s * jnp.exp(m - _finite(peak)) for m, s in (a, b))

    peak, mass = self._fold(part, join, (-jnp.inf, 0.0))
    if self.axis:
      highest = lax.pmax(peak, self.axis)
      mass = lax.psum(mass * jnp.exp(peak - _finite(highest)), self.axis)
      peak = highest
    return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)) + _finite(peak), peak)

  def total(self, of: Callable[[Block], tuple[Float[Array, 'C J'], ...]]):
    """The sum over the columns of each array that `of` gives."""
    part = lambda block: tuple(jnp.sum(x, axis=-1) for x in of(block))
    join = lambda a, b: tuple(x + y for x, y in zip(a, b))
    found = self._fold(part, join, 0.0)
    return lax.psum(found, self.axis) if self.axis else found

  def kth(
    self, of: Callable[[Block], Float[Array, 'C J']], k: int
  ) -> tuple[Float[Array, 'C'], Int[Array, 'C']]:
    """A value and an id that part the K largest columns from the others, ties to the smaller id.

    The K largest are those above the value, and those at it up to the id. Where all columns are
    there they are counted, not sorted: bisection of the value's bits until exactly K are at it or
    above, and of the ids where it is the value of several.
    """
    if self.count > 1:
      return self._kth_of_blocks(of, k)
    block = self.block(0)
    key, ids = _ordered(of(block)), block.ids
    least = jnp.min(key, axis=-1), jnp.max(key, axis=-1)
    if self.axis:
      least = lax.pmin(least[0], self.axis), lax.pmax(least[1], self.axis)

    def count(which):
      found = jnp.sum(which, axis=-1, dtype=jnp.int32)
      return lax.psum(found, self.axis) if self.axis else found

    def raise_low(state):
      low, high, n = state
      middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # their mean, rounded up
      found = count(key >= middle[:, None])
      enough = found >= k
      return (
        jnp.where(enough, middle, low),
        jnp.where(enough, high, middle - 1),
        jnp.where(enough, found, n),
      )

    undecided = lambda state: jnp.any((state[0] < state[1]) & (state[2] != k))
    start = (*least, count(key >= least[0][:, None]))
    low, _, n = lax.while_loop(undecided, raise_low, start)

    def of_several():
      above, same = count(key > low[:, None]), key == low[:, None]

      def lower_high(_, state):
        first, last = state
        middle = (first + last) // 2
        enough = above + count(same & (ids <= middle[:, None])) >= k
        return jnp.where(enough, first, middle + 1), jnp.where(enough, middle, last)

      begin = jnp.zeros_like(low), jnp.full_like(low, 1 << _ID_BITS)
      return lax.fori_loop(0, _ID_BITS + 1, lower_high, begin)[1]

    everything = jnp.full_like(low, jnp.iinfo(jnp.int32).max)
    last = lax.cond(jnp.any(n > k), of_several, lambda: everything)
    return _unordered(low), jnp.where(n > k, last, everything)

  def _kth_of_blocks(self, of, k):
    """The K-th largest itself and its id, from the K largest of each block."""

    def filled(values, ids):
      more = ((0, 0), (0, k - values.shape[-1]))
      return jnp.pad(values, more, constant_values=-jnp.inf), jnp.pad(ids, more, 'edge')

    def part(block):
      values, place = lax.top_k(of(block), min(k, block.ids.shape[0]))
      return filled(values, block.ids[place])

    def largest(values, ids):
      values, place = lax.top_k(values, k)
      return values, jnp.take_along_axis(ids, place, axis=-1)

    # Candidates lie in the order of their ids within equal values, and top_k takes the first.
    join = lambda a, b: largest(*(jnp.concatenate(x, axis=-1) for x in zip(a, b)))
    values, ids = self._fold(part, join, (-jnp.inf, 0))
    if self.axis:
      gather = lambda x: jnp.concatenate(lax.all_gather(x, self.axis), axis=-1)
      values, ids = largest(gather(values), gather(ids))
    return values[:, -1], ids[:, -1]

  def _fold(self, part, join, nothing):
    """The parts of all blocks, joined to `nothing`, whose numbers fill the shapes of a part."""
    if self.count == 1:
      return part(self.block(0))
    shapes = jax.eval_shape(lambda: part(self.block(0)))
    fill = jax.tree.broadcast(nothing, shapes)
    start = jax.tree.map(lambda n, x: jnp.full(x.shape, n, x.dtype), fill, shapes)
    return lax.fori_loop(0, self.count, lambda j, carry: join(carry, part(self.block(j))), start)


def _finite(peak: Array) -> Array:
  return jnp.where(jnp.isfinite(peak), peak, 0.0)


def _ordered(x: Float[Array, '...']) -> Int[Array, '...']:
  """float32 as int32 in the same order; -0 is 0."""
  bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unordered(key: Int[Array, '...']) -> Float[Array, '...']:
  return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)
