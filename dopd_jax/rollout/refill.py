"""More completions than slots: a slot whose completion has ended takes the next one of the queue.

A slot is a row of the decode batch. Its first P columns are a copy of a prompt's, and those after
it a ring: step t writes column t mod C of all slots, whatever position each has come to, so that a
step writes one block and scatters nothing. A completion feeds at most C tokens and so never meets
its own tail; what the slot's earlier completions left is not valid. Positions, keys of the draws
and places in the `Rollout` belong to the completion: which slot it gets changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from dopd_jax.rollout import caches
from dopd_jax.rollout.types import Rollout, StopReason


class _State(NamedTuple):
  """Carry of the loop. `row` is the completion that a slot writes, B where it has none."""

  step: Int[Array, '']
  cache: Any
  row: Int[Array, 'slots']
  count: Int[Array, 'slots']  # tokens of the completion so far
  last: Int[Array, 'slots']  # the newest of them, not yet fed
  taken: Int[Array, '']  # completions that left the queue
  rollout: Rollout


def refill(
  forward: Callable[[Int[Array, 'slots 1'], Bool[Array, 'slots 1'], Any], tuple[Array, Any]],
  draw: Callable[[Float[Array, 'slots D'], Key[Array, 'slots']], tuple[Array, Array, Array]],
  is_stop: Callable[[Int[Array, 'slots']], Bool[Array, 'slots']],
  prompts: Any,
  keys: Key[Array, 'B'],
  active: Bool[Array, 'B'],
  rollout: Rollout,
  slots: int,
) -> tuple[Rollout, Int[Array, '']]:
  """Finishes completions whose first token is drawn, `slots` at a time.

  Args:
    forward: (tokens, valid, cache) -> (hidden [slots, 1, D], cache).
    draw: (hidden, keys of these tokens) -> ids, their log-probs, and those of the draw.
    is_stop: which ids end a completion.
    prompts: the cache [L, b, P, ...] of the prompts; M = B / b completions of each are adjacent.
    keys: of the completions, not yet folded with a position.
    active: those that their first token has not ended.
    rollout: with column 0 written.
    slots: rows of the decode batch.

  Returns: the rollout, and the steps of the loop.
  """
  (B, N), (b, P) = rollout.tokens.shape, prompts.valid.shape
  (queue,) = jnp.nonzero(active, size=B, fill_value=B)
  waiting, first = jnp.sum(active, dtype=jnp.int32), rollout.tokens[:, 0]

  def fill_one(state: _State) -> _State:
    slot = jnp.argmax(state.row == B).astype(jnp.int32)
    row = queue[state.taken].astype(jnp.int32)
    return state._replace(
      cache=caches.put_row(state.cache, slot, prompts, row // (B // b)),
      row=state.row.at[slot].set(row),
      count=state.count.at[slot].set(1),
      last=state.last.at[slot].set(first[row]),
      taken=state.taken + 1,
    )

  def fill(state: _State) -> _State:
    idle = lambda s: jnp.any(s.row == B) & (s.taken < waiting)
    return lax.while_loop(idle, fill_one, state)

  def step(state: _State) -> _State:
    busy = state.row < B
    token = jnp.where(busy, state.last, 0)  # an idle slot feeds what nobody sees
    column = P + state.step % (state.cache.valid.shape[1] - P)
    hidden, cache = forward(token[:, None], busy[:, None], state.cache._replace(index=column))
    folded = jax.vmap(jax.random.fold_in)(keys[jnp.minimum(state.row, B - 1)], state.count)
    token, logp, behaviour_logp = draw(hidden[:, 0], folded)
    stopped, old = busy & is_stop(token), state.rollout
    put = lambda x, new: x.at[state.row, state.count].set(new, mode='drop')  # B is out of bounds
    rollout = Rollout(
      tokens=put(old.tokens, token),
      mask=put(old.mask, busy),
      logp=put(old.logp, logp),
      behaviour_logp=put(old.behaviour_logp, behaviour_logp),
      stop_reason=old.stop_reason.at[jnp.where(stopped, state.row, B)].set(
        jnp.int32(StopReason.STOP), mode='drop'
      ),
    )
    count = state.count + 1
    row = jnp.where(stopped | (count == N), B, state.row)
    return fill(_State(state.step + 1, cache, row, count, token, state.taken, rollout))

  state = _State(
    step=jnp.int32(0),
    cache=caches.empty_rows(prompts, slots),
    row=jnp.full(slots, B, jnp.int32),
    count=jnp.zeros(slots, jnp.int32),
    last=jnp.zeros(slots, jnp.int32),
    taken=jnp.int32(0),
    rollout=rollout,
  )
  state = fill(state)
  lengths = caches.lengths(P, N)
  for columns in lengths if N > 1 else ():
    state = state._replace(cache=caches.grow(state.cache, columns))
    # The ring closes once it has all its columns; until then it grows. No run has B N steps.
    end = columns - P if columns < lengths[-1] else B * N
    state = lax.while_loop(lambda s, end=end: (s.step < end) & jnp.any(s.row < B), step, state)
  return state.rollout, state.step
