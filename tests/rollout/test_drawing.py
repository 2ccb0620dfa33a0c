"""What is drawn: frequencies against exact probabilities, and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dopd_jax.rollout import Sampling, make_sampler
from dopd_jax.rollout.filters import filter_logits
from dopd_jax.rollout.sampler import _invert, categorical
from tests.rollout import toy

V = 300  # three blocks, the last one not full


def sampler(sampling, live_vocab=V, **settings):
  settings = {'stop_ids': (), 'pad_id': 0, **settings}
  return jax.jit(make_sampler(toy.markov(), sampling, live_vocab=live_vocab, **settings))


def first_tokens(table, sampling, count, **settings):
  """`count` draws after token 0, as completions of one prompt."""
  prompt = jnp.zeros((1, 1), jnp.int32)
  return sampler(sampling, **settings)(
    table, prompt, prompt == 0, jax.random.key(7), jnp.asarray([3])
  )


def p_value(tokens, probs):
  """Of a chi-square test; ids expected less than five times are one bin."""
  probs = np.asarray(probs, np.float64)
  expected = probs / probs.sum() * len(tokens)
  observed = np.bincount(tokens, minlength=len(expected))
  assert not observed[expected == 0].any(), 'an id of probability 0 was drawn'
  rare = expected < 5
  bins = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
  bins = [x[:-1] if bins[1][-1] == 0 else x for x in bins]
  return stats.chisquare(*bins).pvalue


SAMPLINGS = [
  dict(),
  dict(temperature=0.5),
  dict(temperature=2.0),
  dict(temperature=1.5, top_k=10),
  dict(top_p=0.7),
  dict(temperature=3.0, min_p=0.2),
  dict(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize('settings', SAMPLINGS, ids=str)
def test_frequencies(settings):
  count = 20_000
  table = 2 * jax.random.normal(jax.random.key(0), (V, V))
  sampling = Sampling(max_new_tokens=1, num_samples=count, **settings)
  rollout = first_tokens(table, sampling, count)
  tokens = np.asarray(rollout.tokens[:, 0])
  logits = filter_logits(table[:1], sampling)
  probs = jax.nn.softmax(logits[0])
  assert p_value(tokens, probs) > 0.01
  np.testing.assert_allclose(
    rollout.behaviour_logp[:, 0], jax.nn.log_softmax(logits[0])[tokens], atol=1e-5
  )
  np.testing.assert_allclose(rollout.logp[:, 0], jax.nn.log_softmax(table[0])[tokens], atol=1e-5)


def test_frequencies_of_a_wrong_distribution_fail_the_test():
  # The power of the test above.
  table = 2 * jax.random.normal(jax.random.key(0), (V, V))
  rollout = first_tokens(table, Sampling(max_new_tokens=1, num_samples=20_000), 20_000)
  assert p_value(np.asarray(rollout.tokens[:, 0]), jax.nn.softmax(table[0] * 1.1)) < 1e-6


def test_rare_and_impossible_ids():
  # All mass in a tail of ids that are each rare, in a vocabulary mostly filtered.
  logits = np.full((1, 1000), -np.inf, np.float32)
  logits[0, 5], logits[0, 700:] = 0.0, -9.0
  keys = jax.random.split(jax.random.key(0), 50_000)
  tokens, _ = categorical(keys, jnp.broadcast_to(jnp.asarray(logits), (50_000, 1000)))
  tail = 300 * np.exp(-9.0)
  expected = 50_000 * tail / (1 + tail)
  tokens = np.asarray(tokens)
  assert set(tokens) <= {5, *range(700, 1000)}
  assert abs((tokens >= 700).sum() - expected) < 4 * np.sqrt(expected)
  assert len(set(tokens)) > 200


def test_the_ends_of_the_unit_interval():
  # uniform = 0 is drawn once in 2^23, and its share of the mass is 0: leading zeros are not it.
  below_one = np.float32(1 - 2.0**-24)
  mass = jnp.asarray([[0, 0, 3, 0, 1, 0]] * 4, jnp.float32)
  uniform = jnp.asarray([0, 0.7499, 0.75, below_one], jnp.float32)
  assert _invert(mass, uniform).tolist() == [2, 2, 4, 4]


def test_rounding_never_gives_a_massless_id():
  rng = np.random.default_rng(0)
  mass = rng.exponential(size=(4_000, 1187)).astype(np.float32) ** 4
  mass *= rng.random(mass.shape) < 0.05
  mass[:, 600] = 1e-6
  for uniform in (np.zeros(4_000), np.full(4_000, 1 - 2.0**-24), rng.random(4_000)):
    ids = np.asarray(_invert(jnp.asarray(mass), jnp.asarray(uniform, jnp.float32)))
    assert (mass[np.arange(4_000), ids] > 0).all()


def test_consecutive_tokens_are_independent():
  # Pairs of tokens of one row, from a uniform table: 8 x 8 cells.
  sampling = Sampling(max_new_tokens=8, num_samples=2_000)
  rollout = first_tokens(jnp.zeros((8, 8)), sampling, 2_000, live_vocab=8)
  tokens = np.asarray(rollout.tokens)
  for left, right in [(0, 1), (0, 7), (3, 4)]:
    assert p_value(tokens[:, left] * 8 + tokens[:, right], np.ones(64)) > 0.01
  assert p_value(tokens[:-1, 0] * 8 + tokens[1:, 0], np.ones(64)) > 0.01  # samples of a record


def test_dead_and_banned_ids():
  # They would be by far the likeliest.
  table = jax.random.normal(jax.random.key(0), (V, V)).at[:, 250:].add(30.0).at[:, 17].add(30.0)
  table = table.at[:, 20].add(5.0)
  for settings in (dict(), dict(temperature=0.0), dict(top_k=5), dict(top_p=0.9)):
    sampling = Sampling(max_new_tokens=6, num_samples=500, loss_temperature=0.8, **settings)
    rollout = first_tokens(table, sampling, 500, live_vocab=250, banned_ids=[17])
    tokens = np.asarray(rollout.tokens)
    assert tokens.max() < 250 and not (tokens == 17).any()
    allowed = np.delete(np.arange(250), 17)
    logits = np.asarray(table[0])[allowed] / 0.8
    logp = dict(zip(allowed, jax.nn.log_softmax(jnp.asarray(logits)).tolist()))
    np.testing.assert_allclose(rollout.logp[:, 0], [logp[t] for t in tokens[:, 0]], atol=1e-5)


def test_behaviour_of_greedy_is_certain():
  table = jax.random.normal(jax.random.key(0), (V, V))
  rollout = first_tokens(table, Sampling(max_new_tokens=5, temperature=0.0), 1)
  assert not rollout.behaviour_logp.any() and (rollout.logp < 0).all()
  token = 0
  for drawn in rollout.tokens[0].tolist():
    token = int(table[token].argmax())
    assert drawn == token


def rollouts(M, records, key=0, N=6):
  prompts = jnp.asarray(records, jnp.int32)[:, None] % V
  table = jax.random.normal(jax.random.key(5), (V, V))
  return sampler(Sampling(max_new_tokens=N, num_samples=M))(
    table, prompts, prompts >= 0, jax.random.key(key), jnp.asarray(records)
  )


def test_draws_depend_on_record_and_sample_alone():
  many = rollouts(8, [4, 9, 2]).tokens.reshape(3, 8, -1)
  few = rollouts(4, [9, 4]).tokens.reshape(2, 4, -1)
  alone = rollouts(1, [2]).tokens
  np.testing.assert_array_equal(few, many[jnp.asarray([1, 0]), :4])
  np.testing.assert_array_equal(alone, many[2, :1])


def test_draws_do_not_depend_on_max_new_tokens():
  np.testing.assert_array_equal(rollouts(2, [1, 5], N=3).tokens, rollouts(2, [1, 5]).tokens[:, :3])


def test_samples_records_and_rollouts_differ():
  prompts = jnp.zeros((2, 1), jnp.int32)
  sample = sampler(Sampling(max_new_tokens=12, num_samples=3), live_vocab=V)
  first = sample(jnp.zeros((V, V)), prompts, prompts == 0, jax.random.key(0), jnp.arange(2))
  other = sample(jnp.zeros((V, V)), prompts, prompts == 0, jax.random.key(1), jnp.arange(2))
  rows = np.concatenate([first.tokens, other.tokens])
  assert len({tuple(row) for row in rows}) == 12
  for a in range(12):
    for b in range(a):
      assert (rows[a] == rows[b]).mean() < 0.3


def test_key_of_a_token():
  rollout = rollouts(3, [4, 9])
  table = jax.random.normal(jax.random.key(5), (V, V))
  for row, (record, m) in enumerate([(r, m) for r in (4, 9) for m in range(3)]):
    before = record
    for n, token in enumerate(rollout.tokens[row].tolist()):
      key = jax.random.key(0)
      for number in (record, m, n):
        key = jax.random.fold_in(key, number)
      assert categorical(key[None], table[before][None])[0].tolist() == [token]
      before = token


def test_raw_uint32_keys():
  prompts = jnp.zeros((2, 1), jnp.int32)
  sample = sampler(Sampling(max_new_tokens=4, num_samples=3))
  typed, raw = (
    sample(jnp.zeros((V, V)), prompts, prompts == 0, key, jnp.arange(2)).tokens
    for key in (jax.random.key(3), jax.random.PRNGKey(3))
  )
  np.testing.assert_array_equal(typed, raw)


def test_logits_that_are_no_numbers_are_seen():
  table = jnp.full((V, V), jnp.nan)
  rollout = first_tokens(table, Sampling(max_new_tokens=2, num_samples=2), 2)
  assert jnp.isnan(rollout.logp).all()
  assert ((rollout.tokens >= 0) & (rollout.tokens < V)).all()
