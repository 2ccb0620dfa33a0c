"""What training changes: parameters, optimizer state, step, and copies of the student in use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dopd_jax import sharding
from dopd_jax.config import Optimizer
from dopd_jax.objectives import Objective


class TrainState(NamedTuple):
  """Everything that a checkpoint holds as arrays; float32, sharded like the parameters."""

  step: Int[Array, '']  # rollout batches trained on
  params: Any
  opt_state: Any
  ema: Any  # running mean of the student, None unless a view reads it
  frozen: Any  # the student as given, None unless a view reads it


def optimizer(
  cfg: Optimizer, steps: int, updates: int = 1, freeze: str = 'nothing'
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global norm; linear warm-up, then a cosine to `final_share`.

  `updates` of the optimizer a step share its learning rate. What `freeze` names has no part in the
  norm and does not move.
  """
  by_step = learning_rate(cfg, steps)

  def schedule(count: Any):
    return by_step(count // updates)

  adamw = optax.adamw(
    schedule, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=_decays
  )
  clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  if freeze == 'nothing':
    return optax.chain(clip, adamw)
  still = optax.masked(optax.set_to_zero(), lambda params: _named(params, freeze))
  return optax.chain(still, clip, adamw, still)


def learning_rate(cfg: Optimizer, steps: int) -> optax.Schedule:
  """Rate by steps done: 0 before the first, full after the warm-up, `final_share` after all."""
  decay = optax.cosine_decay_schedule(
    cfg.learning_rate, max(steps - cfg.warmup_steps, 1), alpha=cfg.final_share
  )
  if not cfg.warmup_steps:
    return decay
  warmup = optax.linear_schedule(0.0, cfg.learning_rate, cfg.warmup_steps)
  return optax.join_schedules([warmup, decay], [cfg.warmup_steps])


def create(params: Any, tx: optax.GradientTransformation, objective: Objective) -> TrainState:
  """The state at step 0. Copies of the student are copies: `update` donates the state."""

  def copy(kind):
    return jax.tree.map(jnp.copy, params) if kind in objective.weights else None

  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    ema=copy('ema'),
    frozen=copy('frozen'),
  )


def place(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
  """The state with every array where `sharding` says, so that no step compiles twice."""
  return jax.device_put(state, shardings(state, mesh))


def shardings(state: TrainState, mesh: jax.sharding.Mesh) -> Any:
  """Where every array of a state, or of its shapes, lies."""
  return TrainState(
    step=sharding.replicated(mesh),  # type: ignore[arg-type] (shardings in the state's shape)
    params=sharding.param_shardings(state.params, mesh),
    opt_state=sharding.param_shardings(state.opt_state, mesh),
    ema=sharding.param_shardings(state.ema, mesh),
    frozen=sharding.param_shardings(state.frozen, mesh),
  )


def abstract(state: TrainState) -> TrainState:
  """Shapes, dtypes and shardings of a state: what a checkpoint is read into."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _decays(params: Any) -> Any:
  """Weight decay is for matrices: the scales of norms and biases are left alone."""
  return _by_path(params, lambda path: not path.endswith(('norm', 'bias', 'scale')))


def _named(params: Any, freeze: str) -> Any:
  """Which parameters `config.freeze` names: of the vision tower, of its mergers, or both."""

  def named(path):
    merger = path.startswith(('vision/merger', 'vision/deepstack_mergers'))
    return path.startswith('vision/') and freeze in ('vision', 'merger' if merger else 'tower')

  return _by_path(params, named)


def _by_path(params: Any, rule: Callable[[str], bool]) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule(jax.tree_util.keystr(path, simple=True, separator='/')), params
  )
