r"""The pure steps: `score` asks every view about a rollout batch, `update` trains on it.

    score    trunk forward a view -> hidden states of the completion rows, signals, and the plan
    update   student trunk with gradient; the head applies each token's rules with its coefficient;
             loss = sum(coef * token_loss); optimizer

Between the two go hidden states, never logits: at V = 151,936 that is 40 times fewer bytes. Logits
exist for `head_tile` completion positions of a micro-batch at once, in float32, and are made again
in the backward pass. Rows are dealt to micro-batches like cards, so that each device keeps its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.losses import pairing, rules
from dopd_jax.models import Model
from dopd_jax.objectives import Objective, Plan, Signals, View, make_plan
from dopd_jax.state import TrainState


class Prompt(NamedTuple):
  """One rendering of the prompts, right-padded: ids [B, P] int32, length [B] int32 >= 1."""

  tokens: Int[Array, 'B P']
  length: Int[Array, 'B']


class Batch(NamedTuple):
  """A rollout batch. `prompts` holds each context that the objective names."""

  prompts: Mapping[str, Prompt]
  tokens: Int[Array, 'B N']  # completions as sampled
  mask: Bool[Array, 'B N']  # which of them are real: a prefix of each row
  supervised: Bool[Array, 'B N']  # which of those may carry loss; all, for sampled completions
  logp: Float[Array, 'B N']  # the sampler's, nats


class Scored(NamedTuple):
  """What is known before the first update. Hidden states belong to the weights that scored."""

  hidden: Mapping[str, Float[Array, 'B N D']]
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
  """`update` and `measure` both take (state, teacher_params, batch, scored)."""

  score: Callable[..., Scored]  # (state, teacher_params, batch)
  update: Callable[..., tuple[TrainState, Updated]]
  measure: Callable[..., TokenView]  # the losses without a gradient, for looking at a pair


def make_steps(
  student: Model,
  teacher: Model | None,
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  live_vocab: int,
  microbatch: int,
  head_tile: int,
) -> Steps:
  """The steps of one method for one pair of models.

  All are pure; the caller jits them and may donate the state to `update`.

  Args:
    student: the model that is trained; it also reads the `ema` and `frozen` weights.
    teacher: the model of the `teacher` weights, or None where no view names it.
    objective: the method.
    tx: the optimizer.
    live_vocab: `len(tokenizer)`: columns of any head beyond it have probability 0.
    microbatch: rows a forward and backward pass; divides the rows of a batch.
    head_tile: completion positions whose logits exist at once.
  """

  def model_of(view: View) -> Model:
    model = teacher if view.weights == 'teacher' else student
    assert model is not None, f'{view} needs a teacher'
    return model

  def weights_of(view: View, state: TrainState, teacher_params: Any) -> Any:
    weights = {
      'student': state.params,
      'ema': state.ema,
      'frozen': state.frozen,
      'teacher': teacher_params,
    }
    return lax.stop_gradient(weights[view.weights])

  def logits_of(hidden, head):
    logits = jnp.einsum(
      'BND,DV->BNV', hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return logits[..., :live_vocab]

  def trunk(model: Model, params: Any, prompt: Prompt, tokens, mask):
    ids, valid = pairing.pack(prompt.tokens, prompt.length, tokens, mask)
    hidden, _ = model.forward(params, ids, valid)
    return pairing.completion_rows(hidden, prompt.length, tokens.shape[1])

  def ask(hidden, head, tokens):
    """Log-prob of the sampled token, LSE and entropy, in one pass over V."""

    def tile(x):
      logits = logits_of(x[0], head) / objective.temperature
      lse = jax.nn.logsumexp(logits, axis=-1)
      logp_y = jnp.take_along_axis(logits, x[1][..., None], axis=-1)[..., 0] - lse
      entropy = lse - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
      return Signals(logp_y, lse, entropy)

    return _over_tiles(tile, (hidden, tokens), head_tile)

  def score(state: TrainState, teacher_params: Any, batch: Batch) -> Scored:
    hidden, signals = {}, {}
    for name, view in objective.views.items():
      model, params = model_of(view), weights_of(view, state, teacher_params)
      head = model.head(params)

      def rows(x, model=model, params=params, head=head, view=view):
        h = trunk(model, params, x.prompts[view.context], x.tokens, x.mask)
        return h, ask(h, head, x.tokens)

      hidden[name], signals[name] = _over_micro_batches(rows, batch, microbatch)
    return Scored(hidden, signals, make_plan(objective, signals, batch.supervised))

  def head_loss(head, hidden, source_heads, source_hidden, tokens, regime, coef):
    """Sum of coef * token_loss over a micro-batch, and what to log of each token."""

    def tile(x):
      hidden, source_hidden, tokens, regime, coef = x
      logits = logits_of(hidden, head)
      sources = {name: logits_of(h, source_heads[name]) for name, h in source_hidden.items()}
      loss = rules.batched_token_loss(
        objective.rules, logits, sources, tokens, regime, objective.temperature
      )
      weighted = jnp.where(coef != 0, coef * jnp.where(coef != 0, loss, 0.0), 0.0)
      scaled = lax.stop_gradient(logits) / objective.temperature
      logp = jax.nn.log_softmax(scaled, axis=-1)
      logp_y = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
      entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
      return weighted, TokenView(lax.stop_gradient(loss), logp_y, entropy)

    xs = (hidden, source_hidden, tokens, regime, coef)
    weighted, seen = _over_tiles(jax.checkpoint(tile), xs, head_tile)
    return jnp.sum(weighted), seen

  used = {rule.source for table in objective.rules for rule in table} & set(objective.views)

  def heads_of_sources(state, teacher_params):
    return {
      name: model_of(view).head(weights_of(view, state, teacher_params))
      for name, view in objective.views.items()
      if name in used
    }

  def rows_of(batch: Batch, scored: Scored):
    """What the student's pass needs of each row."""
    source_hidden = {name: scored.hidden[name] for name in sorted(used)}
    prompt = batch.prompts[objective.student.context]
    return prompt, batch.tokens, batch.mask, source_hidden, scored.plan.regime, scored.plan.coef

  def measure(state: TrainState, teacher_params: Any, batch: Batch, scored: Scored) -> TokenView:
    heads, head = heads_of_sources(state, teacher_params), student.head(state.params)

    def rows(x):
      prompt, tokens, mask, source_hidden, regime, coef = x
      hidden = trunk(student, state.params, prompt, tokens, mask)
      return head_loss(head, hidden, heads, source_hidden, tokens, regime, coef)[1]

    return _over_micro_batches(rows, rows_of(batch, scored), microbatch)

  def update(
    state: TrainState, teacher_params: Any, batch: Batch, scored: Scored
  ) -> tuple[TrainState, Updated]:
    source_heads = heads_of_sources(state, teacher_params)
    head, head_vjp = jax.vjp(student.head, state.params)

    def micro(carry, x):
      grads, head_grads, total = carry
      prompt, tokens, mask, source_hidden, regime, coef = x
      hidden, trunk_vjp = jax.vjp(lambda p: trunk(student, p, prompt, tokens, mask), state.params)
      (loss, seen), (d_head, d_hidden) = jax.value_and_grad(head_loss, (0, 1), has_aux=True)(
        head, hidden, source_heads, source_hidden, tokens, regime, coef
      )
      grads = jax.tree.map(jnp.add, grads, trunk_vjp(d_hidden)[0])
      norm = jnp.linalg.norm(d_hidden.astype(jnp.float32), axis=-1)
      return (grads, head_grads + d_head, total + loss), (seen, norm)

    start = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros_like(head), jnp.float32(0.0))
    n = batch.tokens.shape[0] // microbatch
    (grads, head_grads, loss), seen = lax.scan(micro, start, _deal(rows_of(batch, scored), n))
    grads = jax.tree.map(jnp.add, grads, head_vjp(head_grads)[0])
    token, head_grad = _gather(seen, n)

    grad_norm = optax.tree.norm(grads)
    row_finite = jnp.all(jnp.isfinite(token.loss) & jnp.isfinite(head_grad), axis=1)
    ok = jnp.all(row_finite) & jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    new_state = _apply(state, grads, ok, jnp.any(batch.supervised))
    return new_state, Updated(loss, grad_norm, row_finite, ok, token, head_grad)

  def _apply(state: TrainState, grads, ok, some_tokens) -> TrainState:
    """One optimizer step; the old state if `ok` is False, only the count if there was no token."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(params, ema, objective.ema_rate)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok & some_tokens, a, b), new, old)
    return TrainState(
      step=state.step + ok.astype(jnp.int32),
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      ema=keep(ema, state.ema),
      frozen=state.frozen,
    )

  return Steps(score, update, measure)


def _deal(tree: Any, n: int) -> Any:
  """[B, ...] -> [n, B/n, ...]: row r goes to micro-batch r mod n."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), tree)


def _gather(tree: Any, n: int) -> Any:
  """The inverse of `_deal`."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(n * x.shape[1], *x.shape[2:]), tree)


def _over_micro_batches(fn: Callable, batch: Any, microbatch: int) -> Any:
  """`fn` over micro-batches of rows, one after the other."""
  rows = jax.tree.leaves(batch)[0].shape[0]
  n = rows // microbatch
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
