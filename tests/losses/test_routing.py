import math

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dopd_jax import losses
from dopd_jax.losses import Regime
from tests.losses import oracle


def batch(seed, B=6, N=9):
  rng = np.random.default_rng(seed)
  s, t = -rng.exponential(1.0, (2, B, N)).astype(np.float32)
  lengths = rng.integers(0, N + 1, B)
  return s, t, np.arange(N)[None] < lengths[:, None]


@pytest.mark.parametrize('scope', ['batch', 'sequence'])
@pytest.mark.parametrize('trim', [0.0, 0.05, 0.3])
def test_route_matches_the_formula(scope, trim):
  for seed in range(8):
    s, t, mask = batch(seed)
    got = losses.route(s, t, mask, trim, scope)
    regime, thresholds = oracle.route(s, t, mask, trim, scope)
    np.testing.assert_array_equal(got.regime, regime)
    shape = () if scope == 'batch' else (6, 1)
    assert got.gap_threshold.shape == got.confidence_threshold.shape == shape
    for value, want in zip((got.gap_threshold, got.confidence_threshold), thresholds.T):
      np.testing.assert_allclose(np.broadcast_to(value, (6, 1))[:, 0], want, rtol=1e-5)


def test_regimes_partition_the_mask():
  s, t, mask = batch(3)
  got = losses.route(s, t, mask)
  assert set(np.unique(got.regime[mask])) == {0, 1, 2, 3}
  assert (got.regime[~mask] == Regime.MASKED).all()
  assert [r.name for r in sorted(Regime)[1:]] == ['LH', 'LL', 'HT', 'HS']


def test_gap_is_between_the_privileged_policies():
  """pT = .82 and pSp = .20 with the hint: 1.411, a high gap at threshold 1 (not the .0247 to S)."""
  gap = losses.privilege_advantage_gap(jnp.log(0.20), jnp.log(0.82))
  np.testing.assert_allclose(gap, 1.411, atol=5e-4)


def test_side_is_the_sign_of_the_signed_gap():
  s, t = jnp.log(jnp.array([[0.5, 0.1, 0.9, 0.5]])), jnp.log(jnp.array([[0.5, 0.9, 0.1, 0.5]]))
  got = losses.route(s, t, jnp.ones((1, 4), bool), trim=0.0)
  assert got.regime.tolist() == [[Regime.LH, Regime.HT, Regime.HS, Regime.LH]]


def test_equal_policies_have_no_gap():
  """A gap of 0 everywhere: 0 >= 0, so every token is a high-gap token in the teacher's favour."""
  s, _, mask = batch(4)
  got = losses.route(s, s, mask)
  assert (got.gap == 0).all() and got.gap_threshold == 0
  assert (got.regime[mask] == Regime.HT).all()


@pytest.mark.parametrize('count', [1, 2, 3, 19, 20, 21, 39, 41, 1001])
@pytest.mark.parametrize('trim', [0.0, 0.05, 0.5])
def test_trimmed_mean_keeps_what_numpy_quantile_keeps(count, trim):
  values = np.random.default_rng(count).normal(size=count).astype(np.float32)
  kept = values[values <= np.quantile(values.astype(np.float64), 1 - trim)]
  mask = np.concatenate([np.ones(count, bool), np.zeros(5, bool)])
  padded = np.concatenate([values, np.full(5, np.nan, np.float32)])
  np.testing.assert_allclose(losses.trimmed_mean(padded, mask, trim), kept.mean(), atol=2e-6)


def test_trimmed_mean_edges():
  ties = jnp.array([1.0] * 19 + [0.5])
  np.testing.assert_allclose(losses.trimmed_mean(ties, jnp.ones(20, bool)), 0.975, rtol=1e-6)
  assert losses.trimmed_mean(ties, jnp.zeros(20, bool)) == 0
  two_rows = losses.trimmed_mean(
    jnp.array([[1.0, 3.0], [9.0, 9.0]]), jnp.array([[True, True], [False, False]]), 0.0, axis=-1
  )
  np.testing.assert_array_equal(two_rows, [[2.0], [0.0]])
  for bad in (-0.1, 1.0):
    with pytest.raises(ValueError, match='trim'):
      losses.trimmed_mean(ties, ties > 0, bad)
  with pytest.raises(ValueError, match='scope'):
    losses.route(ties[None], ties[None], ties[None] > 0, scope='token')


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-20, 0, width=32)),
  hnp.arrays(bool, (3, 5)),
)
def test_order_and_padding_change_nothing(logp, mask):
  s, t = logp
  got = losses.route(s, t, mask)
  pad = lambda x, value: np.pad(x, ((1, 0), (0, 3)), constant_values=value)
  padded = losses.route(pad(s, np.nan), pad(t, -np.inf), pad(mask, False))
  np.testing.assert_array_equal(padded.regime[1:, :5], got.regime)
  back = losses.route(s[::-1], t[::-1], mask[::-1])
  np.testing.assert_allclose(back.gap_threshold, got.gap_threshold, rtol=1e-5)
  far = np.abs(got.gap - got.gap_threshold) > 1e-4
  far &= np.abs(got.confidence - got.confidence_threshold) > 1e-4
  np.testing.assert_array_equal(back.regime[::-1][far], got.regime[far])


def test_thresholds_and_regimes_are_constants():
  s, t, mask = batch(5)
  fn = lambda a: sum(jnp.sum(x) for x in losses.route(a, t, mask)[1:])
  assert (jax.grad(fn)(jnp.asarray(s)) == 0).all()


def test_jit_equals_eager():
  s, t, mask = batch(6)
  eager, jitted = losses.route(s, t, mask), jax.jit(losses.route)(s, t, mask)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)
  assert math.isfinite(eager.gap_threshold)
