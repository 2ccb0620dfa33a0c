r"""The pure steps: `score` asks every view about a rollout batch, `update` trains on it.

    score    trunk forward a view -> hidden states of the completion rows, signals, and the plan
    update   student trunk with gradient; the head applies each token's rules with its coefficient;
             loss = sum(coef * token_loss); optimizer; once, or on one share of the rows after the
             other

Between the two go hidden states, never logits: at V = 151,936 that is 40 times fewer bytes. The
fused head (`losses.head`) has logits for `head_tile` tokens at once, in float32, and makes the
gradients on the way. Rows are dealt to micro-batches like cards, so that each device keeps its own.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dopd_jax import heads
from dopd_jax.config import micro_batches
from dopd_jax.losses import pairing, rules
from dopd_jax.losses.head import Part, Rows, Setting, TokenView
from dopd_jax.microbatches import (
  at_width,
  count_rows,
  gather,
  over_micro_batches,
  over_rows_by_length,
  part,
)
from dopd_jax.models import Model
from dopd_jax.objectives import Objective, Plan, Seen, Signals, View, make_plan
from dopd_jax.state import TrainState
from dopd_jax.teachers import Turns


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
    head_tile: `losses.head.Setting.tile`.
    samples: completions a prompt.
    seed: of what the objective draws.
    frozen_vision: no gradient is made for the student's vision features.
    banned_ids: ids that the sampler never draws; every policy gives them probability 0 here too.
  """
  setting = Setting(
    tuple(map(tuple, objective.rules)),
    objective.temperature,
    live_vocab,
    tuple(banned_ids),
    head_tile,
  )

  def readers(view: View) -> Mapping[str, Model]:
    return {'': student} if view.weights in OWN else models[view.weights]

  def params_of(view: View, reader: str, state: TrainState, given: Given) -> Any:
    own = {'student': state.params, 'ema': state.ema, 'frozen': state.frozen}
    params = own[view.weights] if view.weights in own else given[view.weights][reader]
    return lax.stop_gradient(params)

  def look(model: Model, params: Any, images: Any, rows: int):
    """Vision features of every row, made once for the rows of a prompt; None without images."""
    if images is None:
      return None
    assert model.see is not None, 'images are for a model that sees'
    b, see = count_rows(images), functools.partial(model.see, params)
    passes = math.gcd(micro_batches(rows, microbatch), b)
    features = gather(lax.map(lambda m: see(part(images, passes, m)), jnp.arange(passes)), passes)
    return jax.tree.map(lambda x: jnp.repeat(x, rows // b, axis=0), features)

  def trunk(model: Model, params: Any, prompt: Prompt, tokens, mask, features, width=None):
    """Hidden states of the completion; of packed rows only the first `width` columns are read."""
    N = tokens.shape[1]
    ids, valid = pairing.pack(prompt.tokens, prompt.length, tokens, mask)
    more = {}
    if prompt.positions is not None:
      positions = pairing.pack_positions(prompt.positions, prompt.length, N)
      more['positions'] = positions[:, :width]
    if features is not None:
      more['features'] = features
    hidden, _ = model.forward(params, ids[:, :width], valid[:, :width], **more)
    return pairing.completion_rows(hidden, prompt.length, N)

  def ask(model: Model):
    """(params, images, index, (prompt, tokens, mask)) -> hidden states and signals of the rows."""

    @jax.jit
    def rows(params, images, index, batch):
      head = model.head(params)
      prompt, tokens, mask = batch
      length = pairing.packed_length(prompt.length, mask)
      features = look(model, params, images, count_rows(batch))
      whole = prompt, tokens, mask, features, length
      if index is not None:
        whole = jax.tree.map(lambda x: x[index], whole)

      def micro(x):
        prompt, tokens, mask, features, length = x
        read = lambda width: trunk(model, params, prompt, tokens, mask, features, width)
        hidden = at_width(read, prompt.tokens.shape[1] + tokens.shape[1], jnp.max(length))
        return hidden, heads.signals(setting, hidden, head, tokens, mask)

      return over_rows_by_length(micro, whole, whole[-1], microbatch)

    return rows

  asks = {
    (name, reader): ask(model)
    for name, view in objective.views.items()
    for reader, model in readers(view).items()
  }

  @jax.jit
  def compare(hidden, tables, mine, mask):
    """The pair signals of every row."""
    at, zero = jnp.zeros(mask.shape, jnp.int32), jnp.zeros(mask.shape)

    def micro(x):
      hidden, mine, at, zero, mask = x
      found = {}
      for name, pair in objective.pairs.items():
        (student,) = parts_of(hidden, tables, mine, {pair.student: 1.0})
        source = parts_of(hidden, tables, mine, {pair.source: 1.0})
        rule = rules.Rule('source', pair.divergence)
        rows = Rows(at, mask, at, zero)
        seen = heads.losses(
          setting._replace(table=((rule,),)), student.hidden, student.head, {'source': source}, rows
        )
        found[name] = seen.loss
      return found

    return over_micro_batches(micro, (hidden, mine, at, zero, mask), microbatch)

  def parts_of(hidden, tables, mine, blend) -> tuple[Part, ...]:
    """Whose logits make a source: `blend` is the weight of each view in it."""
    return tuple(
      Part(h, tables[view][reader], weight, mine.get(reader))
      for view, weight in blend.items()
      for reader, h in hidden[view].items()
    )

  def tables_of(names, state: TrainState, given: Given):
    """The heads of the views, by reader."""
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
        takes_turns = isinstance(given.get(view.weights), Turns)
        if takes_turns:  # it comes where the cache of the rollout and the last update have gone
          jax.block_until_ready((batch.tokens, state.step))
        found = asks[name, reader](params_of(view, reader, state, given), images, mine, whole)
        if mine is not None:
          found = jax.tree.map(lambda x, i=mine: _spread(x, i, batch.tokens.shape[0]), found)
        if takes_turns:
          jax.block_until_ready(found)  # the next one waits for the memory of this one
        hidden[name][reader] = found[0]
        parts.append(found[1])
      signals[name] = jax.tree.map(lambda *x: sum(x), *parts)
    pairs = {}
    if objective.pairs:
      compared = {x for pair in objective.pairs.values() for x in (pair.student, pair.source)}
      tables = tables_of(compared, state, resident or given)
      seen = {name: hidden[name] for name in compared}
      pairs = compare(seen, tables, rows_of_readers(batch), batch.mask)
    plan = plan_of(signals, batch.supervised, pairs, batch.logp, batch.reward, state.step)
    kept = {name: hidden[name] for name in sorted(objective.sources)}
    return Scored(kept, signals, plan)

  def rows_of_readers(batch: Batch) -> dict[str, Array]:
    """[B] bool of each of several teachers; where there is one, it reads every row."""
    none = jnp.zeros(batch.tokens.shape[0], bool)
    by_reader = (batch.teacher_rows or {}).items()
    return {name: none.at[rows].set(True, mode='drop') for name, rows in by_reader}

  def tables_of_sources(state: TrainState, given: Given, scored: Scored):
    tables = tables_of(scored.hidden, state, given)
    return {n: {r: tables[n][r] for r in readers} for n, readers in scored.hidden.items()}

  def rows_of(batch: Batch, scored: Scored):
    """What each row gives to the student's trunk, (prompt, tokens, mask), and to its head."""
    prompt = batch.prompts[objective.student.prompt]
    plan = scored.plan
    rows = Rows(batch.tokens, batch.mask, plan.regime, plan.coef, plan.advantage, plan.old_logp)
    return (prompt, batch.tokens, batch.mask), (scored.hidden, rows_of_readers(batch), rows)

  def sources_of(hidden, tables, mine):
    """The sources that the rules name, of a micro-batch."""
    named = {r.source for table in objective.rules for r in table if r.source}
    blends = {name: objective.blends.get(name, {name: 1.0}) for name in named}
    return {n: parts_of(hidden, tables, mine, blend) for n, blend in blends.items()}

  def measure(state: TrainState, given: Given, batch: Batch, scored: Scored) -> TokenView:
    tables, head = tables_of_sources(state, given, scored), student.head(state.params)

    def rows(x):
      prompt, tokens, mask = x[0]
      hidden = trunk(student, state.params, prompt, tokens, mask, x[2])
      source_hidden, mine, rows = x[1]
      sources = sources_of(source_hidden, tables, mine)
      return heads.losses(setting, hidden, head, sources, rows)

    seen = look(student, state.params, own_images(batch), batch.tokens.shape[0])
    return over_micro_batches(rows, (*rows_of(batch, scored), seen), microbatch)

  def own_images(batch: Batch):
    return (batch.images or {}).get(objective.student.image)

  def update_once(state: TrainState, rows, tables, see) -> tuple[TrainState, Updated]:
    """One update on `rows`; `see`: parameters -> their vision features, or None."""
    head, head_vjp = jax.vjp(student.head, state.params)
    features, see_vjp = jax.vjp(see, state.params)

    def micro(carry, m):
      grads, d_head, total = carry
      (prompt, tokens, mask), (source_hidden, mine, for_head), features = read(m)
      forward = lambda p, features: trunk(student, p, prompt, tokens, mask, features)
      hidden, trunk_vjp = jax.vjp(forward, state.params, features)
      sources = sources_of(source_hidden, tables, mine)
      seen, d_hidden, d_head = heads.grads(setting, hidden, head, sources, for_head, d_head)
      d_params, d_features = trunk_vjp(d_hidden)
      grads = jax.tree.map(jnp.add, grads, d_params)
      norm = jnp.linalg.norm(d_hidden.astype(jnp.float32), axis=-1)
      loss = jnp.sum(jnp.where(for_head.coef != 0, for_head.coef * seen.loss, 0.0))
      return (grads, d_head, total + loss), (seen, norm, d_features)

    n = micro_batches(count_rows(rows), microbatch)
    read = lambda m: part((*rows, features), n, m)
    _, (source_hidden, mine, for_head), _ = jax.eval_shape(read, 0)
    d_head = heads.zeros(head, sources_of(source_hidden, tables, mine), for_head.live)
    start = (jax.tree.map(jnp.zeros_like, state.params), d_head, jnp.float32(0.0))
    (grads, d_head, loss), seen = lax.scan(micro, start, jnp.arange(n))
    token, head_grad, d_features = gather(seen, n)
    for more in (head_vjp(heads.total(d_head, head))[0], see_vjp(d_features)[0]):
      grads = jax.tree.map(jnp.add, grads, more)

    grad_norm = optax.tree.norm(grads)
    row_finite = jnp.all(jnp.isfinite(token.loss) & jnp.isfinite(head_grad), axis=1)
    ok = jnp.all(row_finite) & jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    new_state = _apply(state, grads, ok & jnp.any(rows[1][2].coef != 0))
    return new_state, Updated(loss, grad_norm, row_finite, ok, token, head_grad)

  def update(
    state: TrainState, given: Given, batch: Batch, scored: Scored
  ) -> tuple[TrainState, Updated]:
    tables, rows = tables_of_sources(state, given, scored), rows_of(batch, scored)
    n, images = objective.updates, own_images(batch)
    still = lax.stop_gradient if frozen_vision else lambda p: p
    see = lambda p: look(student, still(p), images, batch.tokens.shape[0])
    if n == 1:
      new, updated = update_once(state, rows, tables, see)
    else:
      # Each share of the rows stands for the whole batch, so its coefficients grow n-fold.
      plan = scored.plan._replace(coef=n * scored.plan.coef)
      rows = rows_of(batch, scored._replace(plan=plan))

      def share(state, m):
        return update_once(state, part(rows, n, m), tables, lambda p: part(see(p), n, m))

      new, each = lax.scan(share, state, jnp.arange(n))
      whole = gather((each.row_finite, each.token, each.head_grad), n)
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


def _spread(x: Array, index: Int[Array, 'b'], rows: int) -> Array:
  """[b, ...] to the rows `index` of zeros [rows, ...]; an index past the end is left out."""
  return jnp.zeros((rows, *x.shape[1:]), x.dtype).at[index].set(x, mode='drop')
