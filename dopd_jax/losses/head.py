r"""The fused head: hidden states in; loss, gradients and metrics out; logits a tile at a time.

    loss = sum_n coef_n sum_rules weight_n divergence(softmax(h_n W / T), softmax(source_n / T))

One `custom_vjp` makes the gradients in its forward pass: a tile of rows has its logits once, in
float32, and leaves `dz` behind in two matmuls. Rows are taken in the order of what they need, so
that a tile holds the logits of the sources of its rows alone, and rows that are not live cost
nothing: the loop ends before them. Inputs are gathered a tile at a time.

Numerics. Logits leave the matmul in float32 whatever the inputs are; softmaxes, losses and sums are
float32; `dz` is cast to the type of `hidden` for the two backward matmuls, which accumulate in
float32. Top K is exactly K, ties to the smaller id, by a threshold: no gather and no sort.
(Streamed logits are rounded anew in each pass: logits within 1e-6 of the K-th count as ties there.)
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.losses import closed_form, policy_gradient, rules
from dopd_jax.losses.columns import Block, Columns

_DEAD = -1e9  # the logit of an id that has probability 0: finite, so that 0 * log 0 stays 0
# Of the vocabulary, in which the gradient of the head is added up where that spares a second one; a
# GPU would copy the whole gradient at every block, and its matmul adds to what is there.
_BLOCKS = 16
# Of one float32 array of a tile, where the caller leaves its size open.
_TILE_BYTES, _LEAST_BYTES = 1 << 28, 1 << 20


class Part(NamedTuple):
  """A model whose logits are a source, or one summand of them; constants.

  `rows`: where the part counts, None for everywhere: of several teachers each has its own rows.
  """

  hidden: Float[Array, 'N E']  # of the model's own width
  head: Float[Array, 'V E']
  weight: float = 1.0
  rows: Bool[Array, 'N'] | None = None


class Rows(NamedTuple):
  """What is known of each token; `coef` is 0 and `regime` -1 where it has no loss."""

  tokens: Int[Array, 'N']
  live: Bool[Array, 'N']  # the others are not looked at, whatever they hold, and have metrics of 0
  regime: Int[Array, 'N']
  coef: Float[Array, 'N']
  advantage: Float[Array, 'N'] | None = None
  old_logp: Float[Array, 'N'] | None = None


class TokenView(NamedTuple):
  """What the student's own pass says of each token; float32, nats."""

  loss: Float[Array, '...']  # weighted by the rules, unreduced
  logp: Float[Array, '...']  # the trainer's log-prob of the sampled token
  entropy: Float[Array, '...']


class Grads(NamedTuple):
  """`hidden` in its own type; `head` in float32."""

  hidden: Float[Array, 'N D']
  head: Float[Array, 'V D']


class Setting(NamedTuple):
  """What is fixed when the head is compiled.

  table: the rules of each regime.
  temperature: divides every model's logits, once.
  vocab: ids from here on are padding of the tables and have probability 0; 0: none are.
  banned: further ids of probability 0.
  tile: rows whose logits exist at once; 0: a power of two, arrays of at most 256 MiB, and at least
    eight tiles where rules differ.
  columns: vocabulary columns whose logits exist at once; 0: all. Streaming makes the logits again
    in every pass over the vocabulary: the smallest memory, two to four times the time.
  axis: the mesh axis over which the columns of every head are split, inside `shard_map`; '': none.
    `vocab` must be given then.
  """

  table: rules.Table
  temperature: float = 1.0
  vocab: int = 0
  banned: tuple[int, ...] = ()
  tile: int = 0
  columns: int = 0
  axis: str = ''


def head_loss(
  setting: Setting,
  hidden: Float[Array, 'N D'],
  head: Float[Array, 'V D'],
  sources: Mapping[str, Sequence[Part]],
  rows: Rows,
) -> tuple[Float[Array, ''], TokenView]:
  """The loss of N tokens and what was seen of each, differentiable in `hidden` and `head`.

  Args:
    setting: static.
    hidden: [N, D] of the student, at the positions that predict the tokens.
    head: [V, D], as embeddings and Hugging Face's heads lie.
    sources: by the names in the rules, the parts whose logits are summed.
    rows: of the tokens.

  Returns:
    The loss, nats, and the view, a constant for autodiff. A token's loss is exactly 0 where no rule
    has it, all of its view where it is not live.
  """

  @jax.custom_vjp
  def loss(hidden, head):
    return _head(setting, hidden, head, sources, rows, None)[:2]

  def forward(hidden, head):
    value, seen, grads = head_grads(setting, hidden, head, sources, rows)
    return (value, seen), grads

  def backward(grads, g):
    return (grads.hidden * g[0]).astype(hidden.dtype), (grads.head * g[0]).astype(head.dtype)

  loss.defvjp(forward, backward)
  return loss(hidden, head)


def head_grads(
  setting: Setting,
  hidden: Float[Array, 'N D'],
  head: Float[Array, 'V D'],
  sources: Mapping[str, Sequence[Part]],
  rows: Rows,
  d_head: Float[Array, 'V D'] | None = None,
) -> tuple[Float[Array, ''], TokenView, Grads]:
  """As `head_loss`, with its gradients; that of the head is added to `d_head`.

  Inside `shard_map` the loss and the head's gradient are those of this device's rows.
  """
  start = jnp.zeros(head.shape, jnp.float32) if d_head is None else d_head
  loss, seen, grads = _head(setting, hidden, head, sources, rows, start)
  assert grads is not None
  return loss, seen, grads


def head_signals(
  setting: Setting,
  hidden: Float[Array, 'N D'],
  head: Float[Array, 'V D'],
  tokens: Int[Array, 'N'],
  live: Bool[Array, 'N'],
) -> tuple[Float[Array, 'N'], Float[Array, 'N'], Float[Array, 'N']]:
  """Log-prob of the token, log-sum-exp and entropy of a model without gradient; nats, 0 if dead."""
  hidden, head = lax.stop_gradient((hidden, head))
  tiles = _Tiles(setting, head.shape[0], live, jnp.zeros(tokens.shape, jnp.int32))

  def tile(take, carry):
    reader = _Reader(setting, take, (Part(hidden, head),), take(live))
    logp, lse, entropy = _signals(reader.columns(), take(tokens))
    return (logp, lse, entropy), carry

  return tiles.fold(tile, (jnp.float32(0),) * 3, None)[0]


def _head(setting, hidden, head, sources, rows, d_head):
  """(loss, seen, gradients), the last None where there is no `d_head` to add to."""
  if setting.axis and not setting.vocab:
    raise ValueError('with columns split over an axis, vocab must say how many ids are alive')
  table = rules.weights_of(setting.table)
  names = sorted({_source(rule) for rule in table} - {''})
  tiles = _Tiles(setting, head.shape[0], rows.live, _needs(setting.table, sources, rows))
  vocab = setting.vocab or head.shape[0]
  several = len(table) > 1 and hidden.shape[0] > tiles.C  # a tile of all rows needs all of them

  def tile(take, d_head):
    live, ids = take(rows.live), take(rows.tokens)
    regime = jnp.where(live, take(rows.regime), -1)
    coef = jnp.where(live, take(rows.coef), 0.0)
    number = lambda x: None if x is None else jnp.where(live, take(x), 0.0)
    weights = {rule: jnp.asarray(row, jnp.float32)[regime] for rule, row in table.items()}
    student = _Reader(setting, take, (Part(hidden, head),), live)
    pairs, source_lse = {'': student.columns()}, {'': None}
    for name in names:
      theirs = [w != 0 for rule, w in weights.items() if _source(rule) == name]
      wanted = functools.reduce(jnp.logical_or, theirs)
      source = _Reader(setting, take, sources[name], wanted, skip=several)
      pairs[name] = columns = student.columns(source)
      lse = functools.partial(columns.log_sum_exp, closed_form.source_of)
      source_lse[name] = _if_any(wanted, lse, skip=several)

    logp, lse, entropy = _signals(student.columns(), ids)
    tokens = closed_form.Tokens(ids, lse, logp, None, number(rows.advantage), number(rows.old_logp))
    measured, loss = {}, jnp.zeros_like(lse)
    for rule, weight in weights.items():
      if rule.ratio_cap is not None:
        assert tokens.old_logp is not None, rule
        weight *= policy_gradient.capped_ratio(logp, tokens.old_logp, rule.ratio_cap)
        weights[rule] = weight

      def measure(rule=rule):
        known = tokens._replace(source_lse=source_lse[_source(rule)])
        return closed_form.measure(rule, pairs[_source(rule)], known, vocab)

      measured[rule] = _if_any(weight, measure, skip=several)
      loss += _weighted(weight, measured[rule].value)
    seen = loss, logp, entropy
    if d_head is None:
      return seen, None

    scales = {rule: coef * weight / setting.temperature for rule, weight in weights.items()}
    nothing = jnp.zeros_like(lse)
    total = sum((_weighted(g, measured[rule].total) for rule, g in scales.items()), nothing)

    def dz(j):
      grad = jnp.float32(0.0)
      for rule, g in scales.items():

        def of(rule=rule, g=g):
          block = pairs[_source(rule)].block(j)
          u = closed_form.gradient(rule, measured[rule], block, ids, vocab)
          return _weighted(g[:, None], u)

        grad += _if_any(g, of, skip=several)
      p = jnp.exp(student.logits(j) - lse[:, None])
      return (grad - p * total[:, None]).astype(hidden.dtype)

    d_hidden, d_head = student.backward(dz, d_head)
    return (*seen, d_hidden.astype(hidden.dtype)), d_head

  like = (jnp.float32(0),) * 3
  if d_head is not None:
    like = (*like, jnp.zeros(hidden.shape[1:], hidden.dtype))
  found, d_head = tiles.fold(tile, like, d_head)
  seen = TokenView(*found[:3])
  loss = jnp.sum(_weighted(jnp.where(rows.live, rows.coef, 0.0), seen.loss))
  return loss, seen, None if d_head is None else Grads(found[3], d_head)


def _signals(columns: Columns, ids: Array) -> tuple[Array, Array, Array]:
  """Log-prob of the token, log-sum-exp and entropy of the student's logits."""
  lse = columns.log_sum_exp(lambda b: b.student)

  def terms(b):
    p = jnp.exp(b.student - lse[:, None])
    return jnp.where(b.ids == ids[:, None], b.student, 0.0), p * b.student

  at_y, mean = columns.total(terms)
  return at_y - lse, lse, lse - mean


class _Tiles:
  """Tiles of rows in the order of what they need; those that are not live come last."""

  def __init__(self, setting: Setting, vocab: int, live: Array, need: Array):
    N = live.shape[0]
    row = 4 * (setting.columns or vocab)
    fits = _TILE_BYTES // row
    if len(rules.weights_of(setting.table)) > 1:
      # A tile that holds all kinds of rows pays for all of them, a tiny one for its own overhead.
      fits = min(fits, max(N // 8, _LEAST_BYTES // row))
    C = setting.tile or max(128, 1 << max(fits, 1).bit_length() - 1)
    self.C, self.live = C, live
    if C < N:
      order = jnp.argsort(jnp.where(live, need, jnp.iinfo(jnp.int32).max), stable=True)
      self.order = jnp.pad(order, (0, -N % C), constant_values=N)  # past the end
      self.count = (jnp.sum(live) + C - 1) // C

  def fold(self, tile, like, carry):
    """`tile(take, carry) -> (of each row, carry)` over the live tiles; rows in their own order.

    `take` gives the tile's rows of an array [N, ...]; `like` is one row of the result.
    """
    C, N = self.C, self.live.shape[0]
    # A tile with rows that are not live computed them as rows of zeros.
    own = lambda x, live: jnp.where(live.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    if C >= N:
      found, carry = tile(lambda x: x, carry)
      return jax.tree.map(lambda x: own(x, self.live), found), carry
    found = jax.tree.map(lambda x: jnp.zeros((N, *x.shape), x.dtype), like)

    def step(i, state):
      found, carry = state
      rows = lax.dynamic_slice_in_dim(self.order, i * C, C)
      each, carry = tile(lambda x: _rows(x, rows), carry)
      live = _rows(self.live, rows)
      put = lambda all, x: all.at[rows].set(own(x, live), mode='drop', unique_indices=True)
      return jax.tree.map(put, found, each), carry

    return lax.fori_loop(0, self.count, step, (found, carry))


class _Reader:
  """The logits of a tile of rows under the sum of some models: all there, or block by block."""

  def __init__(self, setting: Setting, take, parts, wanted, skip: bool = False):
    self.setting, self.parts, self.skip = setting, parts, skip
    V = parts[0].head.shape[0]
    self.J = min(setting.columns or V, V)
    self.V, self.count = V, -(-V // self.J)
    self.wanted = [wanted if p.rows is None else wanted & take(p.rows) for p in parts]
    self.hidden = [
      jnp.where(here[:, None], take(p.hidden), 0) for p, here in zip(parts, self.wanted)
    ]
    self.whole = self._logits(0) if self.count == 1 else None

  def columns(self, source: '_Reader | None' = None) -> Columns:
    """The columns of these logits beside those of a source."""
    block = lambda j: Block(
      self.logits(j), None if source is None else source.logits(j), self._ids(j)[0], self.count > 1
    )
    return Columns(block, self.count, self.setting.axis)

  def logits(self, j) -> Float[Array, 'C J']:
    """Those of block j, divided by the temperature."""
    return self._logits(j) if self.whole is None else self.whole

  def backward(self, dz, d_head):
    """dH [C, D] float32, and `d_head` [V, D] with this tile's share added."""
    (h,), head = self.hidden, self.parts[0].head
    if self.count > 1:

      def step(j, carry):
        d_hidden, d_head = carry
        dz_j, start = dz(j), self._start(j)
        d_hidden += _dot('CJ,JD->CD', dz_j, self._head(head, j))
        return d_hidden, _add_rows(d_head, _dot('CJ,CD->JD', dz_j, h), start)

      zeros = jnp.zeros(h.shape, jnp.float32)
      d_hidden, d_head = lax.fori_loop(0, self.count, step, (zeros, d_head))
    else:
      dz_all = dz(0)
      d_hidden = _dot('CJ,JD->CD', dz_all, head)
      size = self.V if jax.default_backend() == 'gpu' else -(-self.V // _BLOCKS)
      for start in range(0, self.V, size):
        share = _dot('CJ,CD->JD', dz_all[:, start : start + size], h)
        d_head = _add_rows(d_head, share, start)
    return lax.psum(d_hidden, self.setting.axis) if self.setting.axis else d_hidden, d_head

  def _logits(self, j):
    z = jnp.float32(0.0)
    for part, here, h in zip(self.parts, self.wanted, self.hidden):

      def of(part=part, h=h):
        found = _dot('CD,JD->CJ', h, self._head(part.head, j))
        return found * (part.weight / self.setting.temperature)

      z += _if_any(here, of, skip=self.skip)
    dead = self._ids(j)[1]
    return z if dead is None else jnp.where(dead, _DEAD, z)

  def _head(self, head, j):
    if self.count > 1:
      head = lax.dynamic_slice_in_dim(head, self._start(j), self.J, 0)
    return head

  def _start(self, j):
    """The last block may begin within the one before: its first columns are dead in it."""
    return jnp.minimum(j * self.J, self.V - self.J)

  def _ids(self, j):
    """Ids of the columns of block j, and which have probability 0; None where none has."""
    setting, dead = self.setting, None
    first = lax.axis_index(setting.axis) * self.V if setting.axis else 0
    ids = first + (self._start(j) if self.count > 1 else 0) + jnp.arange(self.J)
    if self.V % self.J:
      dead = ids < first + j * self.J
      ids = jnp.where(dead, -1, ids)  # they are no token's: the block before has these
    if setting.vocab:
      dead = (ids >= setting.vocab) | (False if dead is None else dead)
    if setting.banned:
      banned = jnp.isin(ids, np.array(setting.banned, np.int32))
      dead = banned if dead is None else dead | banned
    return ids, dead


def _dot(letters: str, a: Array, b: Array) -> Array:
  return jnp.einsum(letters, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _rows(x: Array, rows: Int[Array, 'C']) -> Array:
  """`x[rows]`, zeros past the end."""
  take = lambda x: x.at[rows].get(mode='fill', fill_value=0)
  if x.dtype.itemsize != 2:
    return take(x)

  def as_integers(x):
    return lax.bitcast_convert_type(take(lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)

  # A CPU would make a float32 copy of the whole array to read a few 16-bit rows.
  return lax.platform_dependent(x, cpu=as_integers, default=take)


def _add_rows(x: Array, more: Array, start) -> Array:
  old = lax.dynamic_slice_in_dim(x, start, more.shape[0], 0)
  return lax.dynamic_update_slice_in_dim(x, old + more, start, 0)


def _if_any(weight: Array, fn, skip: bool):
  """`fn()` if any row wants it, else zeros of the same shape; without `skip` always `fn()`."""
  if not skip:
    return fn()
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn))
  return lax.cond(jnp.any(weight != 0), fn, lambda: nothing)


def _weighted(weight: Array, x: Array) -> Array:
  """`weight * x`, exactly 0 where the weight is, whatever x is."""
  return jnp.where(weight != 0, weight * jnp.where(weight != 0, x, 0.0), 0.0)


def _source(rule: rules.Rule) -> str:
  return '' if rule.divergence in rules.SOURCELESS else rule.source


def _needs(table: rules.Table, sources: Mapping[str, Sequence[Part]], rows: Rows) -> Array:
  """[N] int32: rows that need the same sources and rules have the same number, near ones share."""
  groups = [tuple(sorted((_source(r), str(r)) for r in rules.weights_of([g]))) for g in table]
  known = sorted(set(groups))
  number = jnp.asarray([known.index(g) for g in groups] + [len(known)], jnp.int32)[rows.regime]
  for parts in sources.values():
    limited = [part.rows for part in parts if part.rows is not None]
    if limited:  # each of several teachers has its own rows, and every view of them the same
      reader = sum(i * mine.astype(jnp.int32) for i, mine in enumerate(limited))
      return number * len(limited) + reader
  return number
