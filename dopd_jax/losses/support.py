r"""Divergences on K tokens instead of V: which tokens, and what becomes of the others."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dopd_jax.losses import divergences

TAILS = ('bucket', 'renormalise', 'truncate')
SUPPORTS = ('student', 'source')


def _log_sum_exp(logp: Array, where: Array) -> Array:
  """`log sum exp` over the last axis; of nothing it is `-inf`, with gradient 0."""
  peak = lax.stop_gradient(jnp.max(logp, axis=-1, keepdims=True, where=where, initial=-jnp.inf))
  peak = jnp.where(peak > -jnp.inf, peak, 0.0)
  live = where & (logp > -jnp.inf)
  mass = jnp.sum(jnp.exp(jnp.where(live, logp - peak, 0.0)), axis=-1, where=live)
  some = mass > 0
  return jnp.where(some, jnp.log(jnp.where(some, mass, 1.0)) + peak[..., 0], -jnp.inf)


def on_support(
  student_logp: Float[Array, '... V'],
  source_logp: Float[Array, '... V'],
  k: int,
  tail: str = 'bucket',
  support: str = 'student',
) -> tuple[Float[Array, '... J'], Float[Array, '... J'], Float[Array, '...']]:
  r"""Both distributions on the K most likely tokens of one of them, ready for any divergence.

      student_K, source_K, covered_mass = on_support(student_logp, source_logp, 128)
      loss = js_divergence(student_K, source_K)

  Exactly K tokens are kept, ties to the smaller id, and the choice is a constant for autodiff. With
  K >= V the full vocabulary comes back in its own order and no tail is added.

  Args:
    student_logp: normalised log-probabilities of the student, nats.
    source_logp: the same of the source; treated as a constant.
    k: how many tokens to keep, at least 1.
    tail: `'bucket'` adds one class with the remaining mass on both sides (J = K + 1): a divergence
      of a coarser distribution, hence >= 0 and <= the full one, and 0 for the remaining mass where
      both sides have none. `'renormalise'` makes both sides sum to 1 on the K tokens (J = K): blind
      to mass that moves between the K and the rest. `'truncate'` does neither: a KL can then be
      negative, and training on it can collapse; it is offered as an ablation only.
    support: whose K most likely tokens, `'student'` or `'source'` (`'teacher'` says the same).

  Returns:
    The student's and the source's log-probabilities on the support, and the probability that the
    policy which chose the support gives to the K tokens, in [0, 1], a constant. Gradients reach the
    student's alone.

  Raises:
    ValueError: k < 1, or an unknown `tail` or `support`.

  Numerics: the tail is a log-sum-exp with the K tokens masked, never `log(1 - mass)`, and has no
  floor.
  """
  if k < 1:
    raise ValueError(f'k must be at least 1, got {k}')
  if tail not in TAILS:
    raise ValueError(f'tail must be one of {TAILS}, got {tail!r}')
  support = 'source' if support == 'teacher' else support
  if support not in SUPPORTS:
    raise ValueError(f'support must be one of {SUPPORTS}, got {support!r}')
  s, t = divergences._prepare(student_logp, source_logp)
  if k >= s.shape[-1]:
    return s, t, jnp.ones(s.shape[:-1], s.dtype)

  chooser = lax.stop_gradient(s) if support == 'student' else t
  top, ids = lax.top_k(chooser, k)
  covered_mass = jnp.sum(jnp.exp(top), axis=-1)
  s_K, t_K = (jnp.take_along_axis(x, ids, axis=-1) for x in (s, t))
  if tail == 'renormalise':
    s_K, t_K = (x - _log_sum_exp(x, jnp.isfinite(x))[..., None] for x in (s_K, t_K))
  elif tail == 'bucket':
    rest = jnp.put_along_axis(jnp.ones(s.shape, bool), ids, False, axis=-1, inplace=False)
    s_K, t_K = (
      jnp.concatenate([x_K, _log_sum_exp(x, rest)[..., None]], axis=-1)
      for x_K, x in ((s_K, s), (t_K, t))
    )
  return s_K, t_K, covered_mass


def top_k_reverse_kl(
  student_logp: Float[Array, '... V'],
  source_logp: Float[Array, '... V'],
  k: int = 128,
  tail: str = 'bucket',
  support: str = 'student',
) -> Float[Array, '...']:
  r"""Reverse KL(student || source) on the K most likely tokens: DOPD's light and weak loss.

  .. math:: \ell = \sum_{v \in K} p_v \log(p_v / q_v) + p_{tail} \log(p_{tail} / q_{tail})

  with `p_tail = 1 - sum_K p` for the default `tail='bucket'`; the other tails as in `on_support`.

  Args:
    student_logp: normalised log-probabilities of the student, nats.
    source_logp: the same of the source; treated as a constant.
    k: how many tokens to keep; K >= V is the full reverse KL.
    tail: `'bucket'`, `'renormalise'` or `'truncate'`.
    support: whose K tokens, `'student'` or `'source'`/`'teacher'`.

  Returns:
    One loss a position, nats, unreduced and unmasked. Source: arXiv 2606.30626, section 3.

  Raises:
    ValueError: as `on_support`.
  """
  student_K, source_K, _ = on_support(student_logp, source_logp, k, tail, support)
  return divergences.reverse_kl(student_K, source_K)


def sampled_token(
  divergence: str,
  student_logp: Float[Array, '... V'],
  source_logp: Float[Array, '... V'],
  tokens: Array,
  clip: float | None = None,
) -> Float[Array, '...']:
  r"""A divergence estimated at the sampled token alone, by its score function.

  The gradient is `sg(c) * grad log p_y` with `c = log p_y/q_y` (reverse KL), `1/2 log p_y/m_y` (JS)
  or `-q_y/p_y` (forward KL): its expectation over `y ~ p` is the exact gradient of the divergence.
  Differentiating `log p_y - log q_y` itself would have expectation 0.

  Args:
    divergence: `'reverse_kl'`, `'forward_kl'` or `'js'`.
    student_logp: normalised log-probabilities of the student, nats.
    source_logp: the same of the source; treated as a constant.
    tokens: `[...]` int32, the sampled tokens y.
    clip: bound on `q_y/p_y` of the forward KL, whose estimator has no bound of its own.

  Returns:
    One estimate a position, nats, whose expectation over `y ~ p` is the divergence: `log p_y/q_y`
    (reverse KL), `q_y/p_y log q_y/p_y` (forward KL), `1/2 (log p_y/m_y + q_y/p_y log q_y/m_y)`
    (JS).

  Raises:
    ValueError: unknown `divergence`.
  """
  s, t = divergences._prepare(student_logp, source_logp)
  s_y, t_y = (jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in (s, t))
  return sampled_score(divergence, s_y, t_y, clip)


def sampled_score(
  divergence: str,
  student_logp_y: Float[Array, '...'],
  source_logp_y: Float[Array, '...'],
  clip: float | None = None,
) -> Float[Array, '...']:
  """`sampled_token` from the log-probs of the sampled tokens; arguments and errors as there."""
  s_y, t_y = student_logp_y, source_logp_y
  log_p = lax.stop_gradient(s_y)
  log_ratio = log_p - t_y
  if divergence == 'reverse_kl':
    value = coefficient = log_ratio
  elif divergence == 'forward_kl':
    ratio = jnp.exp(-log_ratio)
    ratio = ratio if clip is None else jnp.minimum(ratio, clip)
    value = jnp.where(ratio > 0, -ratio * jnp.where(ratio > 0, log_ratio, 0.0), 0.0)
    coefficient = -ratio
  elif divergence == 'js':
    log_p_over_m, log_q_over_m = divergences.logs_over_mixture(log_ratio, 0.5)
    ratio = jnp.exp(-log_ratio)
    value = 0.5 * (log_p_over_m + jnp.where(ratio > 0, ratio * log_q_over_m, 0.0))
    coefficient = 0.5 * log_p_over_m
  else:
    raise ValueError(f'unknown divergence {divergence!r}')
  score = jnp.where(jnp.isfinite(coefficient), coefficient, 0.0) * (s_y - log_p)
  return value + score  # the second term is 0: it is there for its gradient
