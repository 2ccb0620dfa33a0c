"""What training changes: parameters, optimizer state, step, and copies of the student in use."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dopd_jax.config import Optimizer
from dopd_jax.objectives import Objective


class TrainState(NamedTuple):
  """Everything that a checkpoint holds as arrays; float32, sharded like the parameters."""

  step: Int[Array, '']  # rollout batches trained on
  params: Any
  opt_state: Any
  ema: Any  # running mean of the student, None unless a view reads it
  frozen: Any  # the student as given, None unless a view reads it


def optimizer(cfg: Optimizer, steps: int) -> optax.GradientTransformation:
  """AdamW behind a clip of the global norm; linear warm-up, then a cosine to `final_share`."""
  schedule = learning_rate(cfg, steps)
  adamw = optax.adamw(
    schedule, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=_decays
  )
  clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  return optax.chain(clip, adamw)


def learning_rate(cfg: Optimizer, steps: int) -> optax.Schedule:
  """Full rate at update `warmup_steps`, `final_share` of it at update `steps`."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if cfg.warmup_steps else cfg.learning_rate,
    peak_value=cfg.learning_rate,
    warmup_steps=cfg.warmup_steps,
    decay_steps=max(steps, cfg.warmup_steps + 1),
    end_value=cfg.learning_rate * cfg.final_share,
  )


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


def _decays(params: Any) -> Any:
  """Weight decay is for matrices: the scales of norms are left alone."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not jax.tree_util.keystr(path, simple=True, separator='/').endswith('norm'),
    params,
  )
