r"""The pure steps: `score` asks every view about a rollout batch, `update` trains on it.

    score    trunk forward a view -> hidden states of the completion rows, signals, and the plan
    update   student trunk with gradient; the head applies each token's rules with its coefficient;
             loss = sum(coef * token_loss); optimizer; once, or on one share of the rows after the
             other

Between the two go hidden states, never logits: at V = 151,936 that is 40 times fewer bytes. Logits
exist for `head_tile` completion positions of a micro-batch at once, in float32, and are made again
in the backward pass. Rows are dealt to micro-batches like cards, so that each device keeps its own.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.config import micro_batches
from dopd_jax.losses import pairing, rules
from dopd_jax.models import Model
from dopd_jax.objectives import Objective, Plan, Seen, Signals, View, dense, make_plan
from dopd_jax.state import TrainState


class Prompt(NamedTuple):
  """One rendering of the prompts, right-padded: ids [B, P] int32, length [B] int32 >= 1.

  `positions`: rotary ones [B, P, 3], where the prompts hold images; None for the plain count.
  """

  tokens: Int[Array, 'B P']
  length: Int[Array, 'B']
  positions: Int[Array, 'B P 3'] | None = None


class Batch(NamedTuple):
  """A rollout batch. `prompts` holds each rendering that the objective's views name."""

  prompts: Mapping[str, Prompt]
  tokens: Int[Array, 'B N']  # completions as sampled
  mask: Bool[Array, 'B N']  # which of them are real: a prefix of each row
  supervised: Bool[Array, 'B N']  # which of those may carry loss; all, for sampled completions
  logp: Float[Array, 'B N']  # the sampler's, nats
  reward: Float[Array, 'B'] | None = None  # the verifier's, where the objective asks for it
  # What the prompts show, by `View.image`: `models.Images` [b, ...], one a prompt, not a row.
  images: Mapping[str, Any] | None = None
  # Where there are several teachers: the rows of each, padded with B.
  teacher_rows: Mapping[str, Int[Array, 'b']] | None = None


# What is given and never changes, by the words of `View.weights` and, for teachers, by name:
# {'teacher': {'': params}, 'reference': {'': params}}. The models have the same shape.
Given = Mapping[str, Mapping[str, Any]]
OWN = ('student', 'ema', 'frozen')  # the words for weights that the state holds


class Scored(NamedTuple):
  """What is known before the first update, by view; hidden states also by reader.

  They belong to the weights that scored, which `update` must be given unchanged.
  """

  hidden: Mapping[str, Mapping[str, Float[Array, 'B N D']]]
  signals: Mapping[str, Signals]
  plan: Plan


class TokenView(NamedTuple):
  """What the student's own pass says of each token; float32, nats."""

  loss: Float[Array, 'B N']  # weighted by the rules, unreduced
  logp: Float[Array, 'B N']  # the trainer's log-prob of the sampled token
  entropy: Float[Array, 'B N']


class Updated(NamedTuple):
  """What an update tells beside the new state; float32, nats."""

  loss: Float[Array, '']
  grad_norm: Float[Array, '']  # before clipping
  row_finite: Bool[Array, 'B']
  ok: Bool[Array, '']  # False: something was not finite and the old state was kept
  token: TokenView
  head_grad: Float[Array, 'B N']  # norm of dloss/dhidden at each token


class Steps(NamedTuple):
  """`update` and `measure` both take (state, given, batch, scored)."""

  score: Callable[..., Scored]  # (state, given, batch, resident=given)
  update: Callable[..., tuple[TrainState, Updated]]
  measure: Callable[..., TokenView]  # the losses without a gradient, for looking at a pair


def make_steps(
  student: Model,
  models: Given,
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  live_vocab: int,
  microbatch: int,
  head_tile: int,
  samples: int = 1,
  seed: int = 0,
  frozen_vision: bool = False,
  banned_ids: Sequence[int] = (),
) -> Steps:
  """The steps of one method for one set of models.

  All are pure; the caller jits them and may donate the state to `update`. `score` may also run
  unjitted, with a `given` that brings one model at a time onto the device: its parts are jitted,
  and of `resident`, as of the `given` of the others, it reads the heads alone.

  Args:
    student: the model that is trained; it also reads the `ema` and `frozen` weights.
    models: the models of `given`. A view of the teacher is read by all teachers, each its own rows.
    objective: the method.
    tx: the optimizer.
    live_vocab: `len(tokenizer)`: columns of any head beyond it have probability 0.
    microbatch: most rows of a forward and backward pass.
    head_tile: completion positions whose logits exist at once.
    samples: completions a prompt.
    seed: of what the objective draws.
    frozen_vision: no gradient is made for the student's vision features.
    banned_ids: ids that the sampler never draws; every policy gives them probability 0 here too.
  """
  banned = np.isin(np.arange(live_vocab), np.array(banned_ids, np.int64))

  def readers(view: View) -> Mapping[str, Model]:
    return {'': student} if view.weights in OWN else models[view.weights]

  def params_of(view: View, reader: str, state: TrainState, given: Given) -> Any:
    own = {'student': state.params, 'ema': state.ema, 'frozen': state.frozen}
    params = own[view.weights] if view.weights in own else given[view.weights][reader]
    return lax.stop_gradient(params)

  def logits_of(hidden, heads):
    """Of a view: the sum over its readers, of which each has zeros for the rows of the others."""

    def one(h, head):
      logits = jnp.einsum(
        'BND,VD->BNV', h, head.astype(h.dtype), preferred_element_type=jnp.float32
      )
      logits = logits[..., :live_vocab]
      # Finite, so that 0 * log 0 stays 0 everywhere; its exponential is exactly 0.
      return jnp.where(banned, -1e9, logits) if banned_ids else logits

    first, *rest = [one(h, heads[reader]) for reader, h in hidden.items()]
    return sum(rest, first)

  def look(model: Model, params: Any, images: Any, rows: int):
    """Vision features of every row, made once for the rows of a prompt; None without images."""
    if images is None:
      return None
    assert model.see is not None, 'images are for a model that sees'
    b, see = _rows(images), functools.partial(model.see, params)
    passes = math.gcd(micro_batches(rows, microbatch), b)
    features = _gather(lax.map(see, _deal(images, passes)), passes)
    return jax.tree.map(lambda x: jnp.repeat(x, rows // b, axis=0), features)

  def trunk(model: Model, params: Any, prompt: Prompt, tokens, mask, features):
    ids, valid = pairing.pack(prompt.tokens, prompt.length, tokens, mask)
    more = {}
    if prompt.positions is not None:
      N = tokens.shape[1]
      more['positions'] = pairing.pack_positions(prompt.positions, prompt.length, N)
    if features is not None:
      more['features'] = features
    hidden, _ = model.forward(params, ids, valid, **more)
    return pairing.completion_rows(hidden, prompt.length, tokens.shape[1])

  def ask(model: Model):
    """(params, images, index, (prompt, tokens, mask)) -> hidden states and signals of the rows."""

    @jax.jit
    def rows(params, images, index, batch):
      head = model.head(params)
      batch = (*batch, look(model, params, images, _rows(batch)))
      if index is not None:
        batch = jax.tree.map(lambda x: x[index], batch)

      def micro(x):
        hidden = trunk(model, params, *x)
        tokens = x[1]

        def tile(x):
          logits = logits_of({'': x[0]}, {'': head})
          return dense.signals_of(logits, x[1], objective.temperature)

        return hidden, _over_tiles(tile, (hidden, tokens), head_tile)

      return _over_micro_batches(micro, batch, microbatch)

    return rows

  asks = {
    (name, reader): ask(model)
    for name, view in objective.views.items()
    for reader, model in readers(view).items()
  }

  @jax.jit
  def compare(hidden, heads):
    """The pair signals of every row."""

    def tile(x):
      logits = {name: logits_of(h, heads[name]) for name, h in x.items()}
      T = objective.temperature
      return {name: dense.compare(pair, logits, T) for name, pair in objective.pairs.items()}

    rows = lambda x: _over_tiles(tile, x, head_tile)
    return _over_micro_batches(rows, hidden, microbatch)

  def heads_of(names, state: TrainState, given: Given):
    return {
      name: {
        reader: model.head(params_of(objective.views[name], reader, state, given))
        for reader, model in readers(objective.views[name]).items()
      }
      for name in names
    }

  @jax.jit
  def plan_of(signals, mask, pairs, logp, reward, step) -> Plan:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return make_plan(objective, Seen(signals, mask, pairs, logp, reward, samples, key))

  def score(state: TrainState, given: Given, batch: Batch, resident: Given | None = None) -> Scored:
    hidden, signals = {}, {}
    for name, view in objective.views.items():
      whole = batch.prompts[view.prompt], batch.tokens, batch.mask
      hidden[name], parts = {}, []
      for reader in readers(view):
        mine = (batch.teacher_rows or {}).get(reader) if view.weights == 'teacher' else None
        if mine is not None and not len(mine):
          continue  # no record of this batch has this teacher
        images = (batch.images or {}).get(view.image)
        found = asks[name, reader](params_of(view, reader, state, given), images, mine, whole)
        if mine is not None:
          found = jax.tree.map(lambda x, i=mine: _spread(x, i, batch.tokens.shape[0]), found)
          jax.block_until_ready(found)  # the next teacher waits for the memory of this one
        hidden[name][reader] = found[0]
        parts.append(found[1])
      signals[name] = jax.tree.map(lambda *x: sum(x), *parts)
    pairs = {}
    if objective.pairs:
      compared = {x for pair in objective.pairs.values() for x in (pair.student, pair.source)}
      heads = heads_of(compared, state, resident or given)
      pairs = compare({name: hidden[name] for name in compared}, heads)
    plan = plan_of(signals, batch.supervised, pairs, batch.logp, batch.reward, state.step)
    kept = {name: hidden[name] for name in sorted(objective.sources)}
    return Scored(kept, signals, plan)

  def head_loss(head, hidden, source_heads, x):
    """Sum of coef * token_loss over a micro-batch, and what to log of each token."""

    def tile(x):
      hidden, source_hidden, tokens, regime, coef, advantage, old_logp = x
      logits = logits_of({'': hidden}, {'': head})
      views = {name: logits_of(h, source_heads[name]) for name, h in source_hidden.items()}
      loss = rules.batched_token_loss(
        objective.rules,
        logits,
        dense.blend(objective, views),
        tokens,
        regime,
        objective.temperature,
        advantage,
        old_logp,
      )
      weighted = jnp.where(coef != 0, coef * jnp.where(coef != 0, loss, 0.0), 0.0)
      seen = dense.signals_of(lax.stop_gradient(logits), tokens, objective.temperature)
      return weighted, TokenView(lax.stop_gradient(loss), seen.logp_y, seen.entropy)

    weighted, seen = _over_tiles(jax.checkpoint(tile), (hidden, *x), head_tile)
    return jnp.sum(weighted), seen

  def source_heads(state: TrainState, given: Given, scored: Scored):
    heads = heads_of(scored.hidden, state, given)
    return {n: {r: heads[n][r] for r in readers} for n, readers in scored.hidden.items()}

  def rows_of(batch: Batch, scored: Scored):
    """What each row gives to the student's trunk, (prompt, tokens, mask), and to its head."""
    prompt = batch.prompts[objective.student.prompt]
    plan = scored.plan
    x = (scored.hidden, batch.tokens, plan.regime, plan.coef, plan.advantage, plan.old_logp)
    return (prompt, batch.tokens, batch.mask), x

  def measure(state: TrainState, given: Given, batch: Batch, scored: Scored) -> TokenView:
    heads, head = source_heads(state, given, scored), student.head(state.params)

    def rows(x):
      prompt, tokens, mask = x[0]
      hidden = trunk(student, state.params, prompt, tokens, mask, x[2])
      return head_loss(head, hidden, heads, x[1])[1]

    seen = look(student, state.params, own_images(batch), batch.tokens.shape[0])
    return _over_micro_batches(rows, (*rows_of(batch, scored), seen), microbatch)

  def own_images(batch: Batch):
    return (batch.images or {}).get(objective.student.image)

  def update_once(state: TrainState, rows, heads, see) -> tuple[TrainState, Updated]:
    """One update on `rows`; `see`: parameters -> their vision features, or None."""
    head, head_vjp = jax.vjp(student.head, state.params)
    features, see_vjp = jax.vjp(see, state.params)

    def micro(carry, x):
      grads, head_grads, total = carry
      (prompt, tokens, mask), for_head, features = x
      forward = lambda p, features: trunk(student, p, prompt, tokens, mask, features)
      hidden, trunk_vjp = jax.vjp(forward, state.params, features)
      (loss, seen), (d_head, d_hidden) = jax.value_and_grad(head_loss, (0, 1), has_aux=True)(
        head, hidden, heads, for_head
      )
      d_params, d_features = trunk_vjp(d_hidden)
      grads = jax.tree.map(jnp.add, grads, d_params)
      norm = jnp.linalg.norm(d_hidden.astype(jnp.float32), axis=-1)
      return (grads, head_grads + d_head, total + loss), (seen, norm, d_features)

    start = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros_like(head), jnp.float32(0.0))
    n = micro_batches(_rows(rows), microbatch)
    (grads, head_grads, loss), seen = lax.scan(micro, start, _deal((*rows, features), n))
    token, head_grad, d_features = _gather(seen, n)
    for more in (head_vjp(head_grads)[0], see_vjp(d_features)[0]):
      grads = jax.tree.map(jnp.add, grads, more)

    grad_norm = optax.tree.norm(grads)
    row_finite = jnp.all(jnp.isfinite(token.loss) & jnp.isfinite(head_grad), axis=1)
    ok = jnp.all(row_finite) & jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    coef = rows[1][3]
    new_state = _apply(state, grads, ok & jnp.any(coef != 0))
    return new_state, Updated(loss, grad_norm, row_finite, ok, token, head_grad)

  def update(
    state: TrainState, given: Given, batch: Batch, scored: Scored
  ) -> tuple[TrainState, Updated]:
    heads, rows = source_heads(state, given, scored), rows_of(batch, scored)
    n, images = objective.updates, own_images(batch)
    still = lax.stop_gradient if frozen_vision else lambda p: p
    see = lambda p: look(student, still(p), images, batch.tokens.shape[0])
    if n == 1:
      new, updated = update_once(state, rows, heads, see)
    else:
      # Each share of the rows stands for the whole batch, so its coefficients grow n-fold.
      plan = scored.plan._replace(coef=n * scored.plan.coef)
      shares = _deal(rows_of(batch, scored._replace(plan=plan)), n)

      def share(state, x):
        mine = lambda p: jax.tree.map(lambda f: f[x[0]], _deal(see(p), n))
        return update_once(state, x[1], heads, mine)

      new, each = lax.scan(share, state, (jnp.arange(n), shares))
      whole = _gather((each.row_finite, each.token, each.head_grad), n)
      loss, grad_norm = jnp.mean(each.loss), jnp.mean(each.grad_norm)
      updated = Updated(loss, grad_norm, whole[0], jnp.all(each.ok), *whole[1:])
    return new._replace(step=state.step + updated.ok.astype(jnp.int32)), updated

  def _apply(state: TrainState, grads, wanted) -> TrainState:
    """One optimizer step; the old state where a number is not finite or there was no token."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(params, ema, objective.ema_rate)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(wanted, a, b), new, old)
    return state._replace(
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      ema=keep(ema, state.ema),
    )

  return Steps(score, update, measure)


def _rows(tree: Any) -> int:
  return jax.tree.leaves(tree)[0].shape[0]


def _spread(x: Array, index: Int[Array, 'b'], rows: int) -> Array:
  """[b, ...] to the rows `index` of zeros [rows, ...]; an index past the end is left out."""
  return jnp.zeros((rows, *x.shape[1:]), x.dtype).at[index].set(x, mode='drop')


def _deal(tree: Any, n: int) -> Any:
  """[B, ...] -> [n, B/n, ...]: row r goes to micro-batch r mod n."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), tree)


def _gather(tree: Any, n: int) -> Any:
  """The inverse of `_deal`."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(n * x.shape[1], *x.shape[2:]), tree)


def _over_micro_batches(fn: Callable, batch: Any, microbatch: int) -> Any:
  """`fn` over micro-batches of rows, one after the other."""
  n = micro_batches(_rows(batch), microbatch)
  return _gather(lax.map(fn, _deal(batch, n)), n)


def _over_tiles(fn: Callable, xs: Any, tile: int) -> Any:
  """`fn` over tiles of completion positions, [B, N, ...] -> [B, N, ...], one after the other."""
  N = jax.tree.leaves(xs)[0].shape[1]
  n = -(-N // tile)
  t = -(-N // n)  # as even as can be: the last tile is padded by less than n positions

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, n * t - N), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], n, t, *x.shape[2:]).swapaxes(0, 1)

  def join(x):
    return x.swapaxes(0, 1).reshape(x.shape[1], n * t, *x.shape[3:])[:, :N]

  return jax.tree.map(join, lax.map(fn, jax.tree.map(cut, xs)))
