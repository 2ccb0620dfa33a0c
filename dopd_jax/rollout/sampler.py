"""The native sampler: a prompt is read once, and its M completions are written side by side.

Prompts come padded to a bucket, `valid` says what is real, and the same shapes compile once. Each
step of a `lax.while_loop` feeds one token a row and draws the next; the loop ends when every row
has stopped. The cache is part of the loop's carry, so that XLA updates it in place. Where there are
fewer slots than completions, `refill` has the loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from dopd_jax import sharding
from dopd_jax.errors import UserError
from dopd_jax.rollout import caches
from dopd_jax.rollout.filters import filter_logits
from dopd_jax.rollout.refill import refill
from dopd_jax.rollout.types import Decoder, Engine, Rollout, Sampling, StopReason

# A TPU's lane width. 151,936, the vocabulary of Qwen3, is a multiple of it.
_BLOCK = 128


def make_sampler(
  model: Decoder,
  sampling: Sampling,
  *,
  stop_ids: Sequence[int],
  pad_id: int,
  live_vocab: int,
  banned_ids: Sequence[int] = (),
) -> Engine:
  """A pure `sample(params, tokens [b, P], valid [b, P], key, record_index [b], ...) -> Rollout`.

  What else is given by name (`positions`, `features`) goes to the forward pass of the prompts.

  The caller jits it. Ids that are not live, and banned ones, get probability 0 in the draw and in
  `logp`: they are masked before the log-softmax. With temperature 0 the likeliest token is taken,
  the smallest id on a tie, and `behaviour_logp` is 0. Sample m of a record has the key
  `fold_in(fold_in(key, record_index), m)`, folded with the completion position for each token, so
  that it depends neither on the batch nor on M; float rounding may. The same record twice in a
  batch gives the same completions twice. Nor does it depend on `sampling.slots`, which bounds the
  decode cache: prompts are still read, and first tokens drawn, all at once.

  Args:
    model: `forward`, `init_cache`, `head` and, for an int8 cache, `quantize`.
    sampling: lengths, temperature and filters.
    stop_ids: a completion ends with the first of these. Empty: all run to `max_new_tokens`.
    pad_id: what to write after the end. It may be a stop id: masks never come from ids.
    live_vocab: `len(tokenizer)`. Rows of the head beyond it belong to no token.
    banned_ids: never sampled, such as an image placeholder.

  Raises: UserError if every id is banned, or if no stop id can be sampled.
  """
  generate = make_generate(
    model,
    sampling,
    stop_ids=stop_ids,
    pad_id=pad_id,
    live_vocab=live_vocab,
    banned_ids=banned_ids,
  )

  def sample(params, tokens, valid, key, record_index, **prompt):
    return generate(params, tokens, valid, key, record_index, **prompt)[0]

  return sample


class _State(NamedTuple):
  """Carry of the loop. Column `step` of the rollout is the next to be written."""

  step: Int[Array, '']
  cache: Any
  last: Int[Array, 'B']  # the token drawn before this step
  active: Bool[Array, 'B']  # rows that have not stopped
  rollout: Rollout


def make_generate(
  model: Decoder, sampling: Sampling, *, stop_ids, pad_id, live_vocab, banned_ids=()
) -> Callable[..., tuple[Rollout, Int[Array, '']]]:
  """As `make_sampler`, but also returns how many times tokens were drawn before all had stopped."""
  M, N = sampling.num_samples, sampling.max_new_tokens
  sampleable = set(range(live_vocab)) - set(banned_ids)
  if not sampleable:
    raise UserError(f'All {live_vocab} ids of the vocabulary are banned: ban fewer.')
  if stop_ids and sampleable.isdisjoint(stop_ids):
    raise UserError(
      f'No stop id of {sorted(stop_ids)} can be sampled from a vocabulary of {live_vocab} ids with '
      f'{sorted(banned_ids)} banned: name the stop ids of this tokenizer.'
    )
  stops = jnp.asarray(sorted(stop_ids), jnp.int32)

  def generate(params, tokens, valid, key, record_index, **prompt):
    b, P = tokens.shape
    head = model.head(params)
    live = _live_mask(head.shape[0], live_vocab, banned_ids)
    keys = _sample_keys(key, record_index, M)

    def draw(hidden: Float[Array, 'B D'], keys: Key[Array, 'B']):
      logits = jnp.einsum(
        'BD,VD->BV', hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
      )
      logits = jnp.where(live[None, :], logits, -jnp.inf)
      return _draw(keys, logits, sampling)

    def is_stop(token: Int[Array, 'B']) -> Bool[Array, 'B']:
      return jnp.any(token[:, None] == stops[None, :], axis=1)

    def write(state: _State, hidden: Float[Array, 'B D']) -> _State:
      """Draws the token of column `step` for the rows that are active."""
      token, logp, behaviour_logp = draw(hidden, _fold(keys, state.step))
      stopped = state.active & is_stop(token)
      old = state.rollout

      def put(column, new, fill):
        new = jnp.where(state.active, new, jnp.full_like(new, fill))
        return lax.dynamic_update_slice(column, new[:, None], (0, state.step))

      rollout = Rollout(
        tokens=put(old.tokens, token, pad_id),
        mask=put(old.mask, state.active, False),
        logp=put(old.logp, logp, 0),
        behaviour_logp=put(old.behaviour_logp, behaviour_logp, 0),
        stop_reason=jnp.where(stopped, jnp.int32(StopReason.STOP), old.stop_reason),
      )
      return _State(state.step + 1, state.cache, token, state.active & ~stopped, rollout)

    def step(state: _State) -> _State:
      # A stopped row feeds padding that no later token sees; any id will do, pad_id may not be one.
      token = jnp.where(state.active, state.last, 0)
      hidden, cache = model.forward(
        params, token[:, None], state.active[:, None], cache=state.cache
      )
      return write(state._replace(cache=cache), hidden[:, 0])

    hidden, cache = model.forward(params, tokens, valid, cache=model.init_cache(b, P), **prompt)
    last_column = P - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last_column[:, None, None], axis=1)[:, 0]
    if sampling.kv_cache == 'int8':  # from here on: prompts are read at full precision
      cache = model.quantize(cache)

    active = jnp.repeat(jnp.any(valid, axis=1), M)
    state = _State(
      step=jnp.int32(0),
      cache=cache,
      last=jnp.zeros(b * M, jnp.int32),
      active=active,
      rollout=_empty(active, N, pad_id),
    )
    state = write(state, jnp.repeat(hidden, M, axis=0))
    if 0 < sampling.slots < b * M:
      forward = lambda tokens, valid, cache: model.forward(params, tokens, valid, cache=cache)
      rollout, steps = refill(
        forward, draw, is_stop, cache, keys, state.active, state.rollout, sampling.slots
      )
      return rollout, steps + 1

    state = state._replace(cache=caches.repeat(cache, M))
    for columns in caches.lengths(P, N):
      end = columns - P + 1  # the last token is drawn and never fed
      state = state._replace(cache=caches.grow(state.cache, columns))
      state = lax.while_loop(lambda s, end=end: (s.step < end) & jnp.any(s.active), step, state)
    return state.rollout, state.step

  return generate


def _draw(
  keys: Key[Array, 'B'], logits: Float[Array, 'B V'], sampling: Sampling
) -> tuple[Int[Array, 'B'], Float[Array, 'B'], Float[Array, 'B']]:
  """A token a row, its raw log-prob at the loss temperature, and that of the draw; nats."""
  if sampling.greedy:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return token, _logp(logits, token, sampling.loss_temperature), jnp.zeros(token.shape)
  token, behaviour_logp = categorical(keys, filter_logits(logits, sampling))
  if sampling.raw:
    return token, behaviour_logp, behaviour_logp
  return token, _logp(logits, token, sampling.loss_temperature), behaviour_logp


def categorical(
  keys: Key[Array, 'B'], logits: Float[Array, 'B V']
) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
  """Draws from softmax(logits), each row with its own key; returns ids and log-probs in nats.

  Inversion of the distribution function in two stages: a block of 128 ids by its mass, then an id
  by its mass within the block. Two random numbers a row instead of the V of a Gumbel-max. Exact up
  to the float32 rounding of the sums (about 1e-7 of probability), and an id of probability 0 never
  comes.
  """
  B, V = logits.shape
  top = jnp.max(logits, axis=-1, keepdims=True)
  # Every shard of the vocabulary has whole blocks, so that no logits travel but at its edges.
  pad = -V % (_BLOCK * sharding.shards('tensor'))
  mass = sharding.constrain_columns(jnp.pad(jnp.exp(logits - top), ((0, 0), (0, pad))))
  mass = mass.reshape(B, -1, _BLOCK)
  block_mass = jnp.sum(mass, axis=-1)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

  block = _invert(block_mass, uniform[:, 0])
  within = _invert(jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0], uniform[:, 1])
  token = block * _BLOCK + within
  logit = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  return token, logit - top[:, 0] - jnp.log(jnp.sum(block_mass, axis=-1))


def _invert(mass: Float[Array, 'B C'], uniform: Float[Array, 'B']) -> Int[Array, 'B']:
  """First index of positive mass whose cumulative share exceeds `uniform` in [0, 1)."""
  # Prefix sums in parallel are not monotone to the last bit, so positive mass is asked for by name.
  positive = mass > 0
  cumulative = jnp.cumsum(mass, axis=-1)
  total = jnp.max(jnp.where(positive, cumulative, 0.0), axis=-1)
  above = cumulative > (uniform * total)[:, None]
  return jnp.argmax(positive & above, axis=-1).astype(jnp.int32)


def _logp(
  logits: Float[Array, 'B V'], token: Int[Array, 'B'], temperature: float
) -> Float[Array, 'B']:
  logits = logits / temperature
  logit = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  return logit - jax.nn.logsumexp(logits, axis=-1)


def _live_mask(V: int, live_vocab: int, banned_ids: Sequence[int]) -> Bool[np.ndarray, 'V']:
  if not live_vocab <= V:
    raise UserError(
      f'The tokenizer has {live_vocab} ids and the model only {V}: use the tokenizer of this model.'
    )
  ids = np.arange(V)
  return (ids < live_vocab) & ~np.isin(ids, np.asarray(banned_ids, np.int64))


def _sample_keys(key: Key[Array, ''], record_index: Int[Array, 'b'], M: int) -> Key[Array, 'B']:
  records = jax.vmap(lambda record: jax.random.fold_in(key, record))(record_index)
  samples = jnp.arange(M, dtype=jnp.int32)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  keys = fold(records, samples)
  return keys.reshape((-1, *keys.shape[2:]))


def _fold(keys: Key[Array, 'B'], step: Int[Array, '']) -> Key[Array, 'B']:
  return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def _empty(active: Bool[Array, 'B'], N: int, pad_id: int) -> Rollout:
  shape = (active.shape[0], N)
  return Rollout(
    tokens=jnp.full(shape, pad_id, jnp.int32),
    mask=jnp.zeros(shape, bool),
    logp=jnp.zeros(shape, jnp.float32),
    behaviour_logp=jnp.zeros(shape, jnp.float32),
    stop_reason=jnp.where(active, jnp.int32(StopReason.LENGTH), jnp.int32(StopReason.STOP)),
  )
