import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import losses
from tests.losses import oracle
from tests.losses.test_divergences import log_of, logits

TAILS = ('bucket', 'renormalise', 'truncate')


@pytest.mark.parametrize('tail', TAILS)
@pytest.mark.parametrize('support', ['student', 'teacher'])
@pytest.mark.parametrize('k', [1, 3, 10, 11, 50])
def test_value_and_gradient_match_the_formula(tail, support, k):
  z_S, z_T = logits(0, (4, 11)), logits(1, (4, 11))
  value = lambda z: losses.top_k_reverse_kl(
    losses.log_probs(z), losses.log_probs(jnp.asarray(z_T)), k, tail, support
  )

  def expected(z):
    p, q = np.exp(oracle.log_softmax(z)), np.exp(oracle.log_softmax(z_T))
    return np.array([oracle.top_k_reverse_kl(a, b, k, tail, support) for a, b in zip(p, q)])

  np.testing.assert_allclose(value(jnp.asarray(z_S)), expected(z_S), rtol=1e-5, atol=1e-6)
  got = jax.grad(lambda z: value(z).sum())(jnp.asarray(z_S))
  want = oracle.gradient(lambda z: expected(z).sum(), z_S)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * max(1e-1, np.abs(want).max()))


def test_the_three_tails_by_number():
  """T = (.5 .3 .1 .1), S = (.6 .3 .05 .05), k = 2, the source's support, KL(T || S)."""
  S, T = log_of(0.6, 0.3, 0.05, 0.05), log_of(0.5, 0.3, 0.1, 0.1)
  for tail, want in (('truncate', -0.0912), ('bucket', 0.0475), ('renormalise', 0.0038)):
    s, t, covered = losses.on_support(S, T, 2, tail, 'teacher')
    np.testing.assert_allclose(losses.forward_kl(s, t), want, atol=1e-4)
    np.testing.assert_allclose(covered, 0.8, rtol=1e-6)
  np.testing.assert_allclose(losses.forward_kl(S, T), 0.0475, atol=1e-4)


def test_whose_support():
  S, T = log_of(0.55, 0.30, 0.08, 0.04, 0.03), log_of(0.02, 0.03, 0.10, 0.35, 0.50)
  np.testing.assert_allclose(jnp.exp(losses.on_support(S, T, 2)[0][:2]), [0.55, 0.30], rtol=1e-6)
  student, _, _ = losses.on_support(S, T, 2, 'bucket', 'teacher')
  np.testing.assert_allclose(jnp.exp(student[:2]), [0.03, 0.04], rtol=1e-6)
  assert losses.top_k_reverse_kl(S, T, 2) != losses.top_k_reverse_kl(S, T, 2, support='teacher')


def test_exactly_k_and_ties_to_the_smaller_id():
  S = log_of(0.1, 0.3, 0.3, 0.3)
  T = log_of(0.4, 0.1, 0.2, 0.3)
  s, t, _ = losses.on_support(S, T, 2, 'truncate')
  assert s.shape == (2,)
  np.testing.assert_allclose(jnp.exp(t), [0.1, 0.2], rtol=1e-6)


def test_k_of_the_whole_vocabulary_is_the_full_divergence():
  S, T = (losses.log_probs(logits(s, (3, 8))) for s in (2, 3))
  for tail in TAILS:
    for k in (8, 128):
      got = losses.top_k_reverse_kl(S, T, k, tail)
      np.testing.assert_array_equal(got, losses.reverse_kl(S, T))


def test_fewer_live_tokens_than_k_need_no_tail():
  """3 live tokens, K = 5: nothing is left for the tail, so it is the full divergence."""
  ban = jnp.array([0, 0, 0, 1, 1, 1, 1, 1], bool)
  z_S, z_T = (jnp.where(ban, -jnp.inf, logits(s, (8,))) for s in (4, 5))
  T = losses.log_probs(z_T)
  for tail in TAILS:
    fn = lambda z, tail=tail: losses.top_k_reverse_kl(losses.log_probs(z), T, 5, tail)
    value, grad = jax.value_and_grad(fn)(z_S)
    np.testing.assert_allclose(value, losses.reverse_kl(losses.log_probs(z_S), T), rtol=1e-6)
    assert np.isfinite(grad).all()


def test_tail_mass_has_no_floor():
  """The student's tail is e-40: the source's tail must not be floored away from its own e-40."""
  z = jnp.array([0.0, -40.0, -41.0, -42.0])
  s, t, _ = losses.on_support(losses.log_probs(z), losses.log_probs(z - 0.0), 1)
  np.testing.assert_allclose(s[1], oracle.log_softmax(np.array(z))[1:].max() + 0.408, atol=0.01)
  assert s[1] == t[1]


def test_coarse_graining_bounds():
  for seed in range(20):
    S, T = (losses.log_probs(logits(100 * seed + i, (30,))) for i in (0, 1))
    full = losses.reverse_kl(S, T)
    values = [losses.top_k_reverse_kl(S, T, k) for k in (1, 4, 16, 29)]
    assert all(-1e-6 <= v <= full + 1e-5 for v in values)


def test_support_is_a_constant():
  """No gradient flows through the choice, nor to the source."""
  z_S, z_T = jnp.asarray(logits(6, (9,))), jnp.asarray(logits(7, (9,)))
  for support in ('student', 'teacher'):
    fn = lambda z, support=support: losses.top_k_reverse_kl(
      losses.log_probs(z_S), losses.log_probs(z), 3, support=support
    )
    assert (jax.grad(fn)(z_T) == 0).all()


def test_bad_options():
  S = log_of(0.5, 0.5)
  for kwargs, word in (({'k': 0}, 'k'), ({'tail': 'x'}, 'tail'), ({'support': 'x'}, 'support')):
    with pytest.raises(ValueError, match=word):
      losses.on_support(S, S, **({'k': 1} | kwargs))


@pytest.mark.parametrize('divergence', ['reverse_kl', 'forward_kl', 'js'])
def test_sampled_token_is_unbiased(divergence):
  """Summed over y ~ p exactly, value and gradient are those of the full divergence."""
  z_S, T = jnp.asarray(logits(8, (6,))), losses.log_probs(logits(9, (6,)))
  full = {'reverse_kl': losses.reverse_kl, 'forward_kl': losses.forward_kl}.get(
    divergence, losses.js_divergence
  )
  p = jax.nn.softmax(z_S)
  estimates = lambda z: losses.sampled_token(
    divergence, jnp.tile(losses.log_probs(z), (6, 1)), jnp.tile(T, (6, 1)), jnp.arange(6)
  )
  np.testing.assert_allclose(p @ estimates(z_S), full(losses.log_probs(z_S), T), rtol=1e-5)
  got = jnp.einsum('y,yv->v', p, jax.jacrev(estimates)(z_S))
  want = jax.grad(lambda z: full(losses.log_probs(z), T))(z_S)
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert np.abs(want).max() > 1e-2


def test_sampled_token_coefficient_is_detached():
  """log S = -1, log T = -2: the coefficient on grad log S is -1 * (T - S) = 1, and nothing else."""
  S = jnp.log(jnp.array([jnp.exp(-1.0), 1 - jnp.exp(-1.0)]))
  T = jnp.log(jnp.array([jnp.exp(-2.0), 1 - jnp.exp(-2.0)]))
  grad = jax.grad(lambda s: losses.sampled_token('reverse_kl', s, T, jnp.int32(0)))(S)
  np.testing.assert_allclose(grad, [1.0, 0.0], rtol=1e-6)


def test_sampled_forward_kl_clip():
  S, T = log_of(0.01, 0.99), log_of(0.9, 0.1)
  grad = lambda clip: jax.grad(
    lambda s: losses.sampled_token('forward_kl', s, T, jnp.int32(0), clip)
  )(S)[0]
  np.testing.assert_allclose(grad(None), -90, rtol=1e-4)
  np.testing.assert_allclose(grad(5.0), -5, rtol=1e-6)
