import math

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dopd_jax import losses
from tests.losses import oracle

DIVERGENCES = {
  'forward_kl': (losses.forward_kl, lambda p, q: oracle.kl(q, p)),
  'reverse_kl': (losses.reverse_kl, lambda p, q: oracle.kl(p, q)),
  'js': (losses.js_divergence, oracle.js),
  'gjs.25': (lambda s, t: losses.generalised_js(s, t, 0.25), lambda p, q: oracle.js(p, q, 0.25)),
}


def logits(seed, shape, scale=3.0):
  return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_of(*probabilities):
  return jnp.log(jnp.asarray(probabilities, jnp.float32))


@pytest.mark.parametrize('name', DIVERGENCES)
def test_value_and_gradient_match_the_formula(name):
  fn, reference = DIVERGENCES[name]
  z_S, z_T = logits(0, (5, 11)), logits(1, (5, 11))
  value = lambda z: fn(losses.log_probs(z), losses.log_probs(jnp.asarray(z_T)))

  def expected(z):
    p, q = np.exp(oracle.log_softmax(z)), np.exp(oracle.log_softmax(z_T))
    return np.array([reference(a, b) for a, b in zip(p, q)])

  np.testing.assert_allclose(value(jnp.asarray(z_S)), expected(z_S), rtol=1e-5)
  got = jax.grad(lambda z: value(z).sum())(jnp.asarray(z_S))
  want = oracle.gradient(lambda z: expected(z).sum(), z_S)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_directions_are_not_exchanged():
  """KL(T || S) and KL(S || T) for T = (.9, .1), S = (.6, .4)."""
  S, T = log_of(0.6, 0.4), log_of(0.9, 0.1)
  np.testing.assert_allclose(losses.forward_kl(S, T), 0.2263, atol=5e-5)
  np.testing.assert_allclose(losses.reverse_kl(S, T), 0.3112, atol=5e-5)


def test_mixture_is_arithmetic():
  """A mixture averaged in log space would give .8789, above ln 2."""
  got = losses.js_divergence(log_of(0.9, 0.1), log_of(0.1, 0.9))
  np.testing.assert_allclose(got, 0.3681, atol=5e-5)


def test_disjoint_distributions_reach_ln_2_with_finite_gradients():
  z_S, z_T = jnp.array([200.0, 0.0]), jnp.array([0.0, 200.0])
  fn = lambda z: losses.js_divergence(losses.log_probs(z), losses.log_probs(z_T))
  value, grad = jax.value_and_grad(fn)(z_S)
  assert abs(value - math.log(2)) < 1e-6
  assert np.isfinite(grad).all()


def test_generalised_js_weights():
  S, T = log_of(0.7, 0.2, 0.1), log_of(0.1, 0.3, 0.6)
  assert losses.generalised_js(S, T, 0.0) == losses.forward_kl(S, T)
  assert losses.generalised_js(S, T, 1.0) == losses.reverse_kl(S, T)
  assert losses.generalised_js(S, T, 0.5) == losses.js_divergence(S, T)
  # Discontinuous at the ends, as documented: JSD_b / b -> KL(T || S), JSD_b / (1-b) -> KL(S || T).
  for b, ratio in ((0.1, 0.865), (0.01, 0.987), (0.001, 1.0006)):
    np.testing.assert_allclose(losses.generalised_js(S, T, b) / b, ratio, atol=1e-3)
  np.testing.assert_allclose(losses.generalised_js(S, T, 0.999) / 0.001, 1.0998, atol=1e-3)
  for bad in (-0.1, 1.1):
    with pytest.raises(ValueError, match='weight'):
      losses.generalised_js(S, T, bad)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_banned_tokens_contribute_nothing(name):
  """-inf on both sides: the value of the smaller vocabulary, and a gradient of exactly 0 there."""
  fn = DIVERGENCES[name][0]
  z_S, z_T = logits(2, (6,)), logits(3, (6,))
  banned = np.array([0, 0, 0, 0, 1, 1], bool)
  ban = lambda z: jnp.where(banned, -jnp.inf, z)
  value = lambda z: fn(losses.log_probs(ban(z)), losses.log_probs(ban(z_T)))
  got, grad = jax.value_and_grad(value)(jnp.asarray(z_S))
  short = fn(losses.log_probs(z_S[:4]), losses.log_probs(z_T[:4]))
  np.testing.assert_allclose(got, short, rtol=1e-6)
  assert np.isfinite(grad).all() and (grad[4:] == 0).all()
  tangent = jax.jvp(value, (jnp.asarray(z_S),), (jnp.ones(6),))[1]
  assert np.isfinite(tangent)


@pytest.mark.parametrize('name', DIVERGENCES)
@pytest.mark.parametrize('scale', [1e4, -1e4])
def test_huge_logits(name, scale):
  """Probabilities that underflow are 0: they add nothing and poison no gradient."""
  fn, reference = DIVERGENCES[name]
  z_S, z_T = np.float32([scale, 0, -scale, 1]), np.float32([scale, 1, -scale, -3])
  value, grad = jax.value_and_grad(lambda z: fn(losses.log_probs(z), losses.log_probs(z_T)))(z_S)
  p, q = np.exp(oracle.log_softmax(z_S)), np.exp(oracle.log_softmax(z_T))
  np.testing.assert_allclose(value, reference(p, q), atol=1e-6)
  assert np.isfinite(grad).all()


def test_one_hot_teacher():
  """Reverse KL to a source with zeros is +inf; its gradient is finite at every other token."""
  S = losses.log_probs(logits(4, (2, 3)))
  T = jnp.array([[0.0, -jnp.inf, -jnp.inf], [math.log(0.5), math.log(0.25), math.log(0.25)]])
  value = losses.reverse_kl(S, T)
  assert value[0] == jnp.inf and np.isfinite(value[1])
  grad = jax.grad(lambda s: losses.reverse_kl(s, T).sum())(S)
  assert np.isfinite(grad[0, 0]) and np.isfinite(grad[1]).all()
  np.testing.assert_allclose(losses.forward_kl(S, T)[0], -S[0, 0], rtol=1e-6)
  js, js_grad = jax.value_and_grad(lambda s: losses.js_divergence(s, T)[0])(S)
  p = np.exp(np.asarray(S[0], np.float64))
  np.testing.assert_allclose(js, oracle.js(p, np.array([1.0, 0, 0])), rtol=1e-5)
  assert np.isfinite(js_grad).all()


@pytest.mark.parametrize('name', DIVERGENCES)
def test_bf16_is_raised_before_the_softmax(name):
  fn = DIVERGENCES[name][0]
  z_S, z_T = (jnp.asarray(logits(s, (4, 500))).astype(jnp.bfloat16) for s in (5, 6))
  run = lambda a, b: fn(losses.log_probs(a), losses.log_probs(b))
  got, same = run(z_S, z_T), run(z_S.astype(jnp.float32), z_T.astype(jnp.float32))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, same)


def test_near_identical_distributions_keep_their_gradient():
  """The gradient of JS is about p D / 4: rounding in the mixture must not swamp a D of 1e-5."""
  p = oracle.log_softmax(logits(7, (50,)).astype(np.float64))
  D = 1e-4 * np.random.default_rng(8).normal(size=50)
  q = oracle.log_softmax(p - D)
  S, T = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
  got = jax.grad(lambda s: losses.js_divergence(s, T))(S)
  ratio = np.asarray(S, np.float64) - np.asarray(T, np.float64)
  want = 0.5 * np.exp(p) * -np.log(0.5 + 0.5 * np.exp(-ratio))
  np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_source_carries_no_gradient():
  z_S, z_T = jnp.asarray(logits(9, (3, 7))), jnp.asarray(logits(10, (3, 7)))
  for fn, _ in DIVERGENCES.values():
    g = jax.grad(lambda z, fn=fn: fn(losses.log_probs(z_S), losses.log_probs(z)).sum())(z_T)
    assert (g == 0).all()


def test_temperature_is_applied_once():
  """Logits (2, 0) at temperature 2 are (.731, .269); twice would be (.622, .378)."""
  got = jnp.exp(losses.log_probs(jnp.array([2.0, 0.0]), 2.0))
  np.testing.assert_allclose(got, [0.731, 0.269], atol=5e-4)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  hnp.arrays(np.float32, (2, 3, 9), elements=st.floats(-30, 30, width=32)),
  st.floats(-50, 50, width=32),
  st.randoms(use_true_random=False),
)
def test_properties(z, shift, random):
  z_S, z_T = jnp.asarray(z[0]), jnp.asarray(z[1])
  order = list(range(9))
  random.shuffle(order)
  S, T = losses.log_probs(z_S), losses.log_probs(z_T)
  for name, (fn, _) in DIVERGENCES.items():
    value = fn(S, T)
    bound = 1e-5 * (1 + np.abs(z).max())
    assert (value >= -bound).all(), name
    np.testing.assert_allclose(fn(S, S), 0, atol=1e-6)
    grad = jax.grad(lambda a, fn=fn: fn(losses.log_probs(a), S).sum())(z_S)
    np.testing.assert_allclose(grad, 0, atol=1e-6)
    permuted = fn(S[:, jnp.array(order)], T[:, jnp.array(order)])
    np.testing.assert_allclose(permuted, value, rtol=1e-4, atol=bound)
    shifted = fn(losses.log_probs(z_S + shift), T)
    np.testing.assert_allclose(shifted, value, rtol=1e-3, atol=10 * bound)
  js = losses.js_divergence(S, T)
  assert (js <= math.log(2) + 1e-6).all()
  np.testing.assert_allclose(losses.js_divergence(T, S), js, rtol=1e-4, atol=1e-5)
