r"""Dual on-policy distillation on logits: the dense form, and the oracle of every faster one."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.losses import divergences, routing, rules
from dopd_jax.losses import reduction as reductions

STUDENT, TEACHER = 'privileged_student', 'privileged_teacher'


class DopdAux(NamedTuple):
  """`token_loss` [B, N]: nats, weighted by beta, unreduced, 0 where masked."""

  routing: routing.Routing
  token_loss: Float[Array, 'B N']


def dopd_rules(
  *,
  k: int = 128,
  tail: str = 'bucket',
  support: str = 'student',
  beta_light: float = 0.6,
  beta_weak: float = 0.3,
) -> tuple[tuple[rules.Rule, ...], ...]:
  """The paper's table of rules, indexed by `Regime`."""
  top_k = dict(divergence='reverse_kl', region='top_k', k=k, tail=tail, support=support)
  table: dict[routing.Regime, rules.Rule] = {
    routing.Regime.LH: rules.Rule(TEACHER, weight=beta_light, **top_k),
    routing.Regime.LL: rules.Rule(STUDENT, weight=beta_weak, **top_k),
    routing.Regime.HT: rules.Rule(TEACHER, divergence='js', region='full', weight=1.0),
    routing.Regime.HS: rules.Rule(STUDENT, weight=beta_light, **top_k),
  }
  return tuple((table[routing.Regime(r)],) for r in range(len(table)))


def _logp_y(logits: Array, tokens: Array, mask: Array, temperature: float) -> Array:
  logits = jnp.where(mask[..., None], lax.stop_gradient(logits), 0)
  logp = divergences.log_probs(logits, temperature)
  return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def dopd_loss(
  student_logits: Float[Array, 'B N V'],
  privileged_student_logits: Float[Array, 'B N V'],
  privileged_teacher_logits: Float[Array, 'B N V'],
  tokens: Int[Array, 'B N'],
  mask: Bool[Array, 'B N'],
  *,
  k: int = 128,
  tail: str = 'bucket',
  support: str = 'student',
  beta_light: float = 0.6,
  beta_weak: float = 0.3,
  trim: float = 0.05,
  scope: str = 'batch',
  temperature: float = 1.0,
  reduction: str = 'sequence',
) -> tuple[Float[Array, ''], DopdAux]:
  r"""DOPD (arXiv 2606.30626): routes every sampled token and adds its regime's loss.

  .. math::
    \ell_n = \beta_l [LH] RKL_K(S \| Tp) + \beta_w [LL] RKL_K(S \| Sp)
           + [HT] JS(S, Tp) + \beta_l [HS] RKL_K(S \| Sp)

  Row n of every logits array is the distribution that token n was sampled from or is judged by:
  rows `prompt_len - 1 + n` of each model's own prompt (`losses.pairing`).

  Args:
    student_logits: [B, N, V] of S, the deployed student without the hint; the only gradient path.
    privileged_student_logits: [B, N, V] of Sp, the same weights with the hint; a constant.
    privileged_teacher_logits: [B, N, V] of Tp, the teacher with the same hint; a constant.
    tokens: [B, N] int32, sampled from S.
    mask: [B, N] bool, the completion tokens; the stop token is one.
    k: tokens in the top-K losses.
    tail: what becomes of the mass outside: `'bucket'`, `'renormalise'` or `'truncate'`.
    support: whose top K: `'student'` (S) or `'teacher'` (the rule's source).
    beta_light: weight of LH and HS.
    beta_weak: weight of LL.
    trim: share of the largest values that a threshold leaves out.
    scope: thresholds over the `'batch'` or over each `'sequence'`.
    temperature: divides every model's logits, once, in the routing and in the losses.
    reduction: `'sequence'` (mean of tokens, then of non-empty rows) or `'token'`.

  Returns:
    The loss, a scalar in nats, and `DopdAux` with `routing` and `token_loss`.

  Raises:
    ValueError: shapes that do not match, a mask that is not bool, or an unknown option.

  Numerics: everything runs in float32 (float64 for float64 logits), bf16 logits are raised first.
  Of no tokens the loss and its gradient are 0. Where a source gives 0 to a token that S gives mass
  to, the reverse KL is `+inf`, as it should be.
  """
  shapes = {x.shape for x in (student_logits, privileged_student_logits, privileged_teacher_logits)}
  if len(shapes) > 1 or {tokens.shape, mask.shape} != {student_logits.shape[:2]}:
    raise ValueError(
      f'logits must share one shape [B, N, V] and tokens and mask be [B, N]; got logits '
      f'{sorted(shapes)}, tokens {tokens.shape}, mask {mask.shape}'
    )
  if mask.dtype != bool:
    raise ValueError(f'mask must be bool, got {mask.dtype}')
  q_S = _logp_y(privileged_student_logits, tokens, mask, temperature)
  q_T = _logp_y(privileged_teacher_logits, tokens, mask, temperature)
  routed = routing.route(q_S, q_T, mask, trim, scope)
  table = dopd_rules(k=k, tail=tail, support=support, beta_light=beta_light, beta_weak=beta_weak)
  sources = {STUDENT: privileged_student_logits, TEACHER: privileged_teacher_logits}
  loss = rules.batched_token_loss(
    table, student_logits, sources, tokens, routed.regime, temperature
  )
  coef = reductions.coefficients(mask, reduction)
  # 0 * inf at a masked token would be NaN, so the product is masked as well as the factor.
  total = jnp.sum(jnp.where(mask, coef * loss, 0.0))
  return total, DopdAux(routed, lax.stop_gradient(loss))
