r"""Divergences between a student's and a source's next-token distributions.

Every function takes *normalised log-probabilities* `[..., V]` (nats) and returns `[...]`. The
source (the teacher, or the student with privileged input) is a constant: the stop-gradient is
inside.

Numerics, for all of them. Inputs are raised to at least float32 and sums run there. A token to
which the student gives probability 0 (`-inf`) adds exactly 0 wherever its limit is 0, and its
gradient is exactly 0; the same for the source. Both the inputs and the terms are masked, since a
mask on the terms alone protects the value and leaves `0 * inf` in the gradient. A term that is
truly infinite stays `+inf`: it is never clamped. First derivatives only: `js_divergence` and
`generalised_js` write their gradient in closed form.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def as_float(x: Array) -> Array:
  """`x` in float32, or in float64 where it already is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_probs(logits: Float[Array, '... V'], temperature: float = 1.0) -> Float[Array, '... V']:
  """`log softmax(logits / temperature)` in at least float32; `-inf` marks a banned token."""
  return jax.nn.log_softmax(as_float(logits) / temperature, axis=-1)


def _prepare(student_logp: Array, source_logp: Array) -> tuple[Array, Array]:
  return as_float(student_logp), lax.stop_gradient(as_float(source_logp))


def _expect(logp: Array, log_ratio: Array) -> Array:
  """`sum_v exp(logp) * log_ratio` with `0 * anything = 0`, in the value and in both gradients."""
  live = jnp.exp(lax.stop_gradient(logp)) > 0  # also false where the probability underflows
  p = jnp.exp(jnp.where(live, logp, 0.0))
  return jnp.sum(p * jnp.where(live, log_ratio, 0.0), axis=-1, where=live)


def _difference(a: Array, b: Array) -> Array:
  """`a - b` where `a` is finite, 0 elsewhere; safe to differentiate when both are `-inf`."""
  live = a > -jnp.inf
  return jnp.where(live, jnp.where(live, a, 0.0) - jnp.where(live, b, 0.0), 0.0)


def logs_over_mixture(log_ratio: Array, weight: float) -> tuple[Array, Array]:
  """`log(p / m)` and `log(q / m)` from `log_ratio = log(p / q)`, m = (1 - weight) p + weight q.

  The larger of p and q is at most 1 / min(weight, 1 - weight) times m, so one log1p of a bounded
  number gives its log, and the ratio gives the other's: no log of a mixture that has underflowed,
  and full relative precision where p and q are nearly equal. 0 < weight < 1.
  """
  up = log_ratio >= 0
  larger = -jnp.log1p(jnp.where(up, weight, 1.0 - weight) * jnp.expm1(-jnp.abs(log_ratio)))
  return jnp.where(up, larger, larger + log_ratio), jnp.where(up, larger - log_ratio, larger)


def forward_kl(
  student_logp: Float[Array, '... V'], source_logp: Float[Array, '... V']
) -> Float[Array, '...']:
  r"""KL(source || student): expectation under the source, mode-covering.

  .. math:: \ell = \sum_v q_v (\log q_v - \log p_v)

  Args:
    student_logp: normalised log-probabilities `log p` of the student, nats.
    source_logp: the same of the source, `log q`; treated as a constant.

  Returns:
    One divergence a position, nats, unreduced and unmasked. `+inf` where the student gives 0 to a
    token that the source gives mass to. Gradient in `student_logp`: `-q`.
  """
  s, t = _prepare(student_logp, source_logp)
  return _expect(t, _difference(t, s))


def clipped_forward_kl(
  student_logp: Float[Array, '... V'], source_logp: Float[Array, '... V'], clip: float
) -> Float[Array, '...']:
  r"""Forward KL with each token of the vocabulary adding at most `clip` (OPSD, arXiv 2601.18734).

  .. math:: \ell = \sum_v \min(q_v (\log q_v - \log p_v), \tau)

  No divergence: with its large terms clipped a sum can be negative. `clip = inf` is `forward_kl`.

  Args:
    student_logp: normalised log-probabilities `log p` of the student, nats.
    source_logp: the same of the source, `log q`; treated as a constant.
    clip: tau, nats.

  Returns:
    One value a position, nats, unreduced and unmasked. Gradient in `student_logp`: `-q` at the
    tokens below the clip, 0 at the others.
  """
  s, t = _prepare(student_logp, source_logp)
  live = jnp.exp(t) > 0
  term = jnp.where(live, jnp.exp(t) * jnp.where(live, _difference(t, s), 0.0), 0.0)
  return jnp.sum(jnp.minimum(term, clip), axis=-1)


def reverse_kl(
  student_logp: Float[Array, '... V'], source_logp: Float[Array, '... V']
) -> Float[Array, '...']:
  r"""KL(student || source): expectation under the student, mode-seeking.

  .. math:: \ell = \sum_v p_v (\log p_v - \log q_v)

  Args:
    student_logp: normalised log-probabilities `log p` of the student, nats.
    source_logp: the same of the source, `log q`; treated as a constant.

  Returns:
    One divergence a position, nats, unreduced and unmasked. `+inf` where the source gives 0 to a
    token that the student gives mass to; the gradient stays finite at every other token and
    position. Gradient in `student_logp`: `p (log p - log q + 1)`. The loss of on-policy
    distillation (arXiv 2306.13649); DOPD's light and weak regimes.
  """
  s, t = _prepare(student_logp, source_logp)
  return _expect(s, _difference(s, t))


def js_divergence(
  student_logp: Float[Array, '... V'], source_logp: Float[Array, '... V']
) -> Float[Array, '...']:
  r"""Jensen-Shannon divergence, symmetric and bounded by ln 2.

  .. math:: \ell = \tfrac12 KL(p \| m) + \tfrac12 KL(q \| m), \quad m = \tfrac12 (p + q)

  Args:
    student_logp: normalised log-probabilities `log p` of the student, nats.
    source_logp: the same of the source, `log q`; treated as a constant.

  Returns:
    One divergence a position in [0, ln 2] nats, unreduced and unmasked. Gradient in `student_logp`:
    `p/2 log(p/m)`. DOPD's strong regime (arXiv 2606.30626, section 3).
  """
  return generalised_js(student_logp, source_logp, 0.5)


def generalised_js(
  student_logp: Float[Array, '... V'], source_logp: Float[Array, '... V'], weight: float = 0.5
) -> Float[Array, '...']:
  r"""Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649), `weight` = b on the source.

  .. math:: \ell = b KL(q \| m) + (1-b) KL(p \| m), \quad m = b q + (1-b) p

  `b = 0` is exactly `forward_kl` and `b = 1` exactly `reverse_kl`, as GKD's users expect; `b = 1/2`
  is `js_divergence`. The family is *discontinuous at both ends*: as b -> 0 it tends to `b *
  forward_kl`, and as b -> 1 to `(1-b) * reverse_kl`, so b = 0.01 is about a hundred times weaker
  than b = 0.

  Args:
    student_logp: normalised log-probabilities `log p` of the student, nats.
    source_logp: the same of the source, `log q`; treated as a constant.
    weight: b, a Python number in [0, 1]; 1/2 by default.

  Returns:
    One divergence a position, nats, unreduced and unmasked. Gradient in `student_logp` for
    0 < b < 1: `(1-b) p log(p/m)`.

  Raises:
    ValueError: `weight` is outside [0, 1].
  """
  if not 0.0 <= weight <= 1.0:
    raise ValueError(f'weight must be in [0, 1], got {weight}')
  if weight == 0.0:
    return forward_kl(student_logp, source_logp)
  if weight == 1.0:
    return reverse_kl(student_logp, source_logp)
  s, t = _prepare(student_logp, source_logp)
  # The mixture's own derivative sums to nothing (it is where both KLs are stationary), so it is
  # cut: what is left, (1-b) p log(p/m), is exact also where p and q differ by less than rounding.
  fixed = lax.stop_gradient(s)
  # Each side's own guard: at a token that one of them rules out, only the other has a term.
  log_p_over_m, _ = logs_over_mixture(_difference(fixed, t), weight)
  _, log_q_over_m = logs_over_mixture(-_difference(t, fixed), weight)
  return (1.0 - weight) * _expect(s, log_p_over_m) + weight * _expect(t, log_q_over_m)
