import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import losses
from dopd_jax.losses import Regime, Rule
from tests.losses import oracle

B, N, V = 4, 6, 12


def batch(seed=0, lengths=(6, 3, 0, 1)):
  rng = np.random.default_rng(seed)
  z = (2 * rng.normal(size=(3, B, N, V))).astype(np.float32)
  tokens = rng.integers(0, V, (B, N)).astype(np.int32)
  mask = np.arange(N)[None] < np.array(lengths)[:, None]
  return *z, tokens, mask


OPTIONS = [
  {},
  {'k': 4},
  {'k': 4, 'tail': 'renormalise'},
  {'k': 4, 'tail': 'truncate'},
  {'k': 4, 'support': 'teacher'},
  {'k': 4, 'reduction': 'token', 'scope': 'sequence', 'trim': 0.2},
  {'k': 4, 'temperature': 2.0},
  {'k': 4, 'beta_light': 0.9, 'beta_weak': 0.1},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_value_and_gradient_match_the_formula(options):
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  names = {'beta_light': 'light', 'beta_weak': 'weak'}
  reference = {names.get(k, k): v for k, v in options.items()}
  want, token_loss, regime = oracle.dopd(z_S, z_Sp, z_Tp, tokens, mask, **reference)
  fn = lambda z: losses.dopd_loss(z, z_Sp, z_Tp, tokens, mask, **options)
  (got, aux), grad = jax.value_and_grad(fn, has_aux=True)(jnp.asarray(z_S))
  np.testing.assert_array_equal(aux.routing.regime, regime)
  np.testing.assert_allclose(aux.token_loss, token_loss, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  reference['regime'] = regime  # top-K and masks are constants; the differences must see them so
  want_grad = oracle.gradient(
    lambda z: oracle.dopd(z, z_Sp, z_Tp, tokens, mask, **reference)[0], z_S
  )
  np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-5 * np.abs(want_grad).max())


def test_every_regime_occurs_in_the_oracle_batch():
  """Otherwise the comparison above says nothing about the one that is missing."""
  *_, regime = oracle.dopd(*batch())
  assert set(np.unique(regime)) == {-1, 0, 1, 2, 3}


def test_gradient_reaches_the_plain_student_alone():
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  fn = lambda a, b, c: losses.dopd_loss(a, b, c, tokens, mask, k=4)[0]
  g_S, g_Sp, g_Tp = jax.grad(fn, argnums=(0, 1, 2))(*map(jnp.asarray, (z_S, z_Sp, z_Tp)))
  assert np.abs(g_S[mask]).max() > 1e-3
  assert (g_S[~mask] == 0).all() and (g_Sp == 0).all() and (g_Tp == 0).all()


def test_identity():
  """Teacher = student and an empty hint: no loss and no gradient."""
  z_S, _, _, tokens, mask = batch()
  fn = lambda z: losses.dopd_loss(z, z_S, z_S, tokens, mask, k=4)[0]
  value, grad = jax.value_and_grad(fn)(jnp.asarray(z_S))
  np.testing.assert_allclose(value, 0, atol=1e-7)
  np.testing.assert_allclose(grad, 0, atol=1e-7)


def test_self_regularisation_is_anchored_on_the_privileged_student():
  """S = (.4 .1 -.5), Sp = (.9 0 -.2): a loss and a gradient; on S itself there is neither."""
  S, Sp = jnp.array([[0.4, 0.1, -0.5]]), jnp.array([[0.9, 0.0, -0.2]])
  table = ((Rule('self', 'reverse_kl', 'top_k', k=2),),)
  regime, y = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
  fn = lambda z, anchor: losses.token_loss(table, z, {'self': anchor}, y, regime)[0]
  value, grad = jax.value_and_grad(fn)(S, Sp)
  assert value > 1e-3 and np.abs(grad).max() > 1e-2
  value, grad = jax.value_and_grad(fn)(S, S)
  np.testing.assert_allclose(value, 0, atol=1e-7)
  np.testing.assert_allclose(grad, 0, atol=1e-7)


def test_without_a_hint_only_the_teacher_trains():
  z_S, _, z_T, tokens, mask = batch()
  _, aux = losses.dopd_loss(jnp.asarray(z_S), z_S, z_T, tokens, mask, k=4)
  own = np.isin(aux.routing.regime, (Regime.LL, Regime.HS))
  assert own.any()
  np.testing.assert_allclose(aux.token_loss[own], 0, atol=1e-6)


def test_masked_garbage_changes_nothing():
  """NaN, inf and wrong ids at masked positions reach neither value nor gradient."""
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  run = jax.value_and_grad(lambda a, b, c, y: losses.dopd_loss(a, b, c, y, mask, k=4), has_aux=True)
  (want, _), want_grad = run(*map(jnp.asarray, (z_S, z_Sp, z_Tp, tokens)))
  bad = [
    np.where(mask[..., None], z, v) for z, v in zip((z_S, z_Sp, z_Tp), (np.nan, -np.inf, 1e38))
  ]
  (got, aux), grad = run(*map(jnp.asarray, (*bad, np.where(mask, tokens, 0))))
  assert got == want
  np.testing.assert_array_equal(grad, want_grad)
  assert np.isfinite(aux.token_loss).all()


def test_no_tokens_no_loss():
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  fn = lambda z: losses.dopd_loss(z, z_Sp, z_Tp, tokens, mask & False)[0]
  value, grad = jax.value_and_grad(fn)(jnp.asarray(z_S))
  assert value == 0 and (grad == 0).all()


def test_one_token():
  z_S, z_Sp, z_Tp, tokens, mask = batch(lengths=(0, 1, 0, 0))
  want, *_ = oracle.dopd(z_S, z_Sp, z_Tp, tokens, mask, k=4)
  got, _ = losses.dopd_loss(jnp.asarray(z_S), z_Sp, z_Tp, tokens, mask, k=4)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bf16_logits():
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  half = [jnp.asarray(z).astype(jnp.bfloat16) for z in (z_S, z_Sp, z_Tp)]
  got, _ = losses.dopd_loss(*half, tokens, mask, k=4)
  want, _ = losses.dopd_loss(*(z.astype(jnp.float32) for z in half), tokens, mask, k=4)
  assert got.dtype == jnp.float32 and got == want


def test_impossible_token_is_infinite_in_its_own_row_alone():
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  z_Sp, z_Tp = (np.array(z) for z in (z_Sp, z_Tp))
  other = np.argmin(z_S[0, 0])
  z_Tp[0, 0, other] = z_Sp[0, 0, other] = -np.inf
  tokens = tokens.copy()
  tokens[0, 0] = (other + 1) % V
  fn = lambda z: losses.dopd_loss(z, z_Sp, z_Tp, tokens, mask)
  (_, aux), grad = jax.value_and_grad(fn, has_aux=True)(jnp.asarray(z_S))
  assert np.isfinite(np.asarray(aux.token_loss)[1:]).all()
  assert np.isfinite(grad[1:]).all() and np.isfinite(grad[0, 1:]).all()


@pytest.mark.parametrize('reduction, want', [('token', 2.0), ('sequence', 3.5)])
def test_reductions(reduction, want):
  """Losses (1, 3) counted and (9, 9) masked beside a row (5), (none): 9/3 = 3 by token is not 2."""
  loss = jnp.array([[1.0, 3.0, 9.0, 9.0], [5.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
  mask = jnp.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  if reduction == 'token':
    mask = mask.at[1].set(False)
  coef = losses.coefficients(mask, reduction)
  np.testing.assert_allclose(jnp.sum(coef * loss), want, rtol=1e-6)


def test_micro_batches_cannot_change_the_mean():
  """Losses (4, 4) and six of 1: 14/8 however they are cut, where a mean of means gives 2.5."""
  loss = jnp.array([[4.0, 4, 0, 0, 0, 0], [1.0, 1, 1, 1, 1, 1]])
  mask = jnp.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
  coef = losses.coefficients(mask, 'token')
  np.testing.assert_allclose(sum(jnp.sum(c * l) for c, l in zip(coef, loss)), 1.75, rtol=1e-6)


def test_several_rules_in_a_regime_add_up():
  z_S, z_Sp, z_Tp, tokens, _ = batch()
  rules = (Rule('a', 'reverse_kl', weight=0.5), Rule('b', 'forward_kl', weight=2.0))
  both = losses.token_loss(
    (rules,), z_S[0], {'a': z_Sp[0], 'b': z_Tp[0]}, tokens[0], jnp.zeros(N, int)
  )
  S, A, T = (losses.log_probs(z[0]) for z in (z_S, z_Sp, z_Tp))
  want = 0.5 * losses.reverse_kl(S, A) + 2 * losses.forward_kl(S, T)
  np.testing.assert_allclose(both, want, rtol=1e-5)


def test_cross_entropy_needs_no_source():
  z_S, _, _, tokens, _ = batch()
  got = losses.token_loss(
    ((Rule('', 'cross_entropy'),),), z_S[0], {}, tokens[0], jnp.array([0] * 5 + [-1])
  )
  want = -oracle.log_softmax(z_S[0])[np.arange(N), tokens[0]]
  np.testing.assert_allclose(got[:5], want[:5], rtol=1e-5)
  assert got[5] == 0


def test_vmap_jit_and_loop_agree():
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  _, aux = losses.dopd_loss(jnp.asarray(z_S), z_Sp, z_Tp, tokens, mask, k=4)
  jitted = jax.jit(lambda *a: losses.dopd_loss(*a, k=4)[1].token_loss)
  np.testing.assert_allclose(jitted(z_S, z_Sp, z_Tp, tokens, mask), aux.token_loss, atol=1e-6)
  for b in range(B):
    sources = {'privileged_student': z_Sp[b], 'privileged_teacher': z_Tp[b]}
    one = losses.token_loss(
      losses.dopd_rules(k=4), z_S[b], sources, tokens[b], aux.routing.regime[b]
    )
    np.testing.assert_allclose(one, aux.token_loss[b], atol=1e-6)


def test_mistakes_are_errors():
  z_S, z_Sp, z_Tp, tokens, mask = batch()
  with pytest.raises(ValueError, match='shape'):
    losses.dopd_loss(z_S, z_Sp[:2], z_Tp, tokens, mask)
  with pytest.raises(ValueError, match='bool'):
    losses.dopd_loss(z_S, z_Sp, z_Tp, tokens, mask.astype(np.float32))
  with pytest.raises(ValueError, match='reduction'):
    losses.dopd_loss(z_S, z_Sp, z_Tp, tokens, mask, reduction='sum')
  for bad in (Rule('a', 'kl'), Rule('a', 'js', 'half'), Rule('a', 'js', 'top_k', k=0)):
    with pytest.raises(ValueError):
      losses.token_loss(((bad,),), z_S[0], {'a': z_Sp[0]}, tokens[0], jnp.zeros(N, int))
