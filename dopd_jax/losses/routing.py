r"""Which tokens carry capability and which only the hint: gap, thresholds and regimes of DOPD."""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.losses.divergences import as_float

SCOPES = ('batch', 'sequence')


class Regime(enum.IntEnum):
  """Who supervises a token. First letter: gap below (L) or above (H) its threshold."""

  LH = 0  # small gap, both policies confident: light teacher
  LL = 1  # small gap, not confident: weak self-regularisation
  HT = 2  # large gap in the teacher's favour: strong teacher
  HS = 3  # large gap in the student's favour: light self-regularisation
  MASKED = -1


class Routing(NamedTuple):
  """What `route` decided. All constants for autodiff; log-probs in nats."""

  regime: Int[Array, 'B N']  # `Regime`, -1 where masked
  gap: Float[Array, 'B N']  # |log q_T - log q_S|, 0 where masked
  gap_threshold: Float[Array, '...']  # [] for scope batch, [B, 1] for scope sequence
  confidence: Float[Array, 'B N']  # q_S + q_T in [0, 2], 0 where masked
  confidence_threshold: Float[Array, '...']  # as gap_threshold


def privilege_advantage_gap(
  student_logp_y: Float[Array, '...'], teacher_logp_y: Float[Array, '...']
) -> Float[Array, '...']:
  r"""The privilege advantage gap `A = |log q_T - log q_S|` (arXiv 2606.30626, Eq. 1).

  Args:
    student_logp_y: log-prob of the sampled token under the *privileged* student, nats. The student
      without the privileged input would count the hint itself as ability.
    teacher_logp_y: the same under the privileged teacher.

  Returns:
    A in nats, a constant. 0 where both policies give the token probability 0.
  """
  s, t = (lax.stop_gradient(as_float(x)) for x in (student_logp_y, teacher_logp_y))
  return jnp.where(s == t, 0.0, jnp.abs(t - s))


def trimmed_mean(
  values: Float[Array, '...'],
  mask: Bool[Array, '...'],
  trim: float = 0.05,
  axis: int | None = None,
) -> Float[Array, '...']:
  """Mean of the values under `mask` that are at most their `1 - trim` quantile.

  The quantile interpolates linearly, as `numpy.quantile` does; ties with it are kept.

  Args:
    values: any shape; entries where `mask` is False are ignored, whatever they are.
    mask: bool, the shape of `values`.
    trim: share of the largest values to leave out, in [0, 1).
    axis: None for one mean of everything (shape []), else that axis is reduced and kept as 1.

  Returns:
    The trimmed mean, a constant; 0 where the mask selects nothing.

  Raises:
    ValueError: `trim` is outside [0, 1).
  """
  if not 0.0 <= trim < 1.0:
    raise ValueError(f'trim must be in [0, 1), got {trim}')
  values = lax.stop_gradient(as_float(values))
  if axis is None:
    values, mask, squeeze = values.reshape(-1), mask.reshape(-1), True
    axis = 0
  else:
    squeeze = False
  ordered = jnp.sort(jnp.where(mask, values, jnp.inf), axis=axis)
  count = jnp.sum(mask, axis=axis, keepdims=True)
  last = jnp.maximum(count - 1, 0)
  position = (1.0 - trim) * last.astype(ordered.dtype)
  low = jnp.clip(jnp.floor(position).astype(count.dtype), 0, last)
  high = jnp.minimum(low + 1, last)
  fraction = position - low.astype(ordered.dtype)
  at_low, at_high = (jnp.take_along_axis(ordered, i, axis=axis) for i in (low, high))
  spread = jnp.where(at_high == at_low, 0.0, at_high - at_low)  # inf - inf is no number
  quantile = at_low + jnp.where(fraction > 0, fraction * spread, 0.0)
  keep = mask & (values <= quantile)
  kept = jnp.sum(keep, axis=axis, keepdims=True)
  total = jnp.sum(values, axis=axis, keepdims=True, where=keep)
  mean = jnp.where(kept > 0, total / jnp.maximum(kept, 1).astype(total.dtype), 0.0)
  return mean[0] if squeeze else mean


def axis_of(scope: str) -> int | None:
  """The axis of `trimmed_mean` for a scope; raises `ValueError` for one that is unknown."""
  if scope not in SCOPES:
    raise ValueError(f'scope must be one of {SCOPES}, got {scope!r}')
  return None if scope == 'batch' else -1


def route(
  student_logp_y: Float[Array, 'B N'],
  teacher_logp_y: Float[Array, 'B N'],
  mask: Bool[Array, 'B N'],
  trim: float = 0.05,
  scope: str = 'batch',
) -> Routing:
  r"""Routes every completion token to one of the four regimes (arXiv 2606.30626, section 3).

  With `q_S`, `q_T` the probabilities of the *sampled* token, `A = |log q_T - log q_S|`,
  `C = q_S + q_T` and bars for trimmed means:

      LH: A <  Abar and C >= Cbar        HT: A >= Abar and q_T >= q_S
      LL: A <  Abar and C <  Cbar        HS: A >= Abar and q_T <  q_S

  Args:
    student_logp_y: [B, N] log-prob of the sampled token under the privileged student, nats.
    teacher_logp_y: [B, N] the same under the privileged teacher.
    mask: [B, N] bool, the completion tokens (the stop token is one).
    trim: share of the largest values that a threshold leaves out, for each statistic by itself.
    scope: `'batch'` for one pair of thresholds over all tokens, `'sequence'` for one a row.

  Returns:
    A `Routing`; the confidence threshold is the trimmed mean of q_S + q_T.

  Raises:
    ValueError: unknown `scope`, or `trim` outside [0, 1).
  """
  axis = axis_of(scope)
  s, t = (lax.stop_gradient(as_float(x)) for x in (student_logp_y, teacher_logp_y))
  s, t = jnp.where(mask, s, 0.0), jnp.where(mask, t, 0.0)
  gap = privilege_advantage_gap(s, t)
  confidence = jnp.where(mask, jnp.exp(s) + jnp.exp(t), 0.0)
  gap_threshold = trimmed_mean(gap, mask, trim, axis)
  confidence_threshold = trimmed_mean(confidence, mask, trim, axis)
  regime = regimes(gap, gap_threshold, confidence, confidence_threshold, t >= s, mask)
  return Routing(regime, gap, gap_threshold, confidence, confidence_threshold)


def regimes(
  gap: Float[Array, 'B N'],
  gap_threshold: Float[Array, '...'],
  confidence: Float[Array, 'B N'],
  confidence_threshold: Float[Array, '...'],
  teacher_ahead: Bool[Array, 'B N'],
  mask: Bool[Array, 'B N'],
) -> Int[Array, 'B N']:
  """The four regimes of any gap and confidence; thresholds broadcast, values at one are above.

  Args:
    gap: how much the two policies differ on a token.
    gap_threshold: from which on that is much.
    confidence: how sure both are, where they differ little.
    confidence_threshold: from which on that is sure.
    teacher_ahead: whether the teacher is the one to follow where they differ much.
    mask: bool, the completion tokens.

  Returns:
    int32 `Regime`, -1 where masked.
  """
  low = jnp.where(confidence >= confidence_threshold, Regime.LH.value, Regime.LL.value)
  high = jnp.where(teacher_ahead, Regime.HT.value, Regime.HS.value)
  regime = jnp.where(gap >= gap_threshold, high, low)
  return jnp.where(mask, regime, Regime.MASKED.value).astype(jnp.int32)
