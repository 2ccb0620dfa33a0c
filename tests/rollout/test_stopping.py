"""Where completions end, on models whose completions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax.errors import UserError
from dopd_jax.rollout import Sampling, StopReason, make_sampler
from dopd_jax.rollout.sampler import make_generate
from tests.rollout import toy

V = 64


def run(rows, N, stop_ids, pad_id=0, temperature=1.0, valid=None, **settings):
  model, params, prompts = toy.script(rows, V)
  generate = make_generate(
    model,
    Sampling(max_new_tokens=N, temperature=temperature, **settings),
    stop_ids=stop_ids,
    pad_id=pad_id,
    live_vocab=V,
  )
  valid = jnp.ones(prompts.shape, bool) if valid is None else jnp.asarray(valid)
  return jax.jit(generate)(params, prompts, valid, jax.random.key(0), jnp.arange(len(rows)))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_several_stop_ids(temperature):
  rows = [[7, 8, 3], [11, 5], [21, 22, 23, 24, 25, 26], [31, 32, 33, 34, 35, 3]]
  rollout, steps = run(rows, 6, stop_ids=[3, 5], pad_id=9, temperature=temperature)
  assert rollout.tokens.tolist() == [
    [7, 8, 3, 9, 9, 9],
    [11, 5, 9, 9, 9, 9],
    [21, 22, 23, 24, 25, 26],
    [31, 32, 33, 34, 35, 3],
  ]
  assert rollout.mask.sum(axis=1).tolist() == [3, 2, 6, 6]
  assert rollout.mask[:2].tolist() == [[True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
  stop, length = StopReason.STOP, StopReason.LENGTH
  assert rollout.stop_reason.tolist() == [stop, stop, length, stop]
  assert steps == 6


def test_pad_that_is_the_stop_id():
  rollout, _ = run([[7, 8, 3], [11, 12, 13, 14]], 4, stop_ids=[3], pad_id=3)
  assert rollout.tokens.tolist() == [[7, 8, 3, 3], [11, 12, 13, 14]]
  assert rollout.mask.tolist() == [[True, True, True, False], [True] * 4]


def test_pad_that_is_no_id():
  rollout, _ = run([[7, 3], [11, 12, 13, 14]], 4, stop_ids=[3], pad_id=-1)
  assert rollout.tokens.tolist() == [[7, 3, -1, -1], [11, 12, 13, 14]]


def test_loop_ends_when_all_rows_have_stopped():
  rollout, steps = run([[7, 8, 3], [11, 3]], 50, stop_ids=[3])
  assert steps == 3
  assert rollout.tokens.shape == (2, 50)


def test_first_token_is_the_stop_token():
  rollout, steps = run([[3], [5]], 50, stop_ids=[3, 5])
  assert steps == 1
  assert rollout.tokens[:, 0].tolist() == [3, 5]
  assert rollout.mask.sum(axis=1).tolist() == [1, 1]
  assert (rollout.stop_reason == StopReason.STOP).all()


def test_one_new_token():
  rollout, steps = run([[3], [7, 8]], 1, stop_ids=[3])
  assert steps == 1
  assert rollout.tokens.tolist() == [[3], [7]]
  assert rollout.stop_reason.tolist() == [StopReason.STOP, StopReason.LENGTH]


def test_no_stop_ids():
  rollout, steps = run([[7, 8, 3, 9]], 4, stop_ids=[])
  assert rollout.mask.all() and steps == 4


def test_a_row_without_a_prompt_samples_nothing():
  rows = [[7, 8, 9, 10], [11, 12, 13, 14]]
  rollout, _ = run(rows, 4, stop_ids=[3], pad_id=1, valid=[[True, True], [False, False]])
  assert rollout.mask.tolist() == [[True] * 4, [False] * 4]
  assert rollout.tokens[1].tolist() == [1] * 4
  assert rollout.stop_reason.tolist() == [StopReason.LENGTH, StopReason.STOP]
  assert not rollout.logp[1].any()


def test_log_probs_are_zero_after_the_end():
  params = jax.random.normal(jax.random.key(0), (V, V))
  sample = make_sampler(
    toy.markov(),
    Sampling(max_new_tokens=40, num_samples=4, temperature=0.7),
    stop_ids=range(20),
    pad_id=0,
    live_vocab=V,
  )
  prompts = jnp.arange(8)[:, None]
  rollout = jax.jit(sample)(params, prompts, prompts >= 0, jax.random.key(1), jnp.arange(8))
  mask = np.asarray(rollout.mask)
  assert 0 < mask.mean() < 0.3
  assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # a prefix of each row
  for values in (rollout.logp, rollout.behaviour_logp):
    assert values.dtype == jnp.float32
    assert (np.asarray(values)[mask] < 0).all() and not np.asarray(values)[~mask].any()
  stops = np.asarray(rollout.tokens)[mask] < 20
  assert stops.sum() == (rollout.stop_reason == StopReason.STOP).sum()  # exactly one a row


@pytest.mark.parametrize(
  'settings, word',
  [
    (dict(temperature=-1.0), 'temperature'),
    (dict(temperature=float('nan')), 'temperature'),
    (dict(temperature=float('inf')), 'temperature'),
    (dict(temperature=1e-9), 'temperature'),
    (dict(loss_temperature=0.0), 'loss_temperature'),
    (dict(top_p=0.0), 'top_p'),
    (dict(top_p=1.1), 'top_p'),
    (dict(top_k=-1), 'top_k'),
    (dict(top_k=2.5), 'top_k'),
    (dict(min_p=-0.1), 'min_p'),
    (dict(min_p=1.1), 'min_p'),
    (dict(max_new_tokens=0), 'max_new_tokens'),
    (dict(num_samples=0), 'num_samples'),
    (dict(num_samples=True), 'num_samples'),
  ],
)
def test_settings_that_mean_nothing(settings, word):
  with pytest.raises(UserError, match=f'^{word}='):
    Sampling(**{'max_new_tokens': 4, **settings})


def make(**settings):
  base = dict(stop_ids=[3], pad_id=0, live_vocab=V)
  return make_sampler(toy.markov(), Sampling(max_new_tokens=2), **{**base, **settings})


def test_vocabularies_that_cannot_work():
  with pytest.raises(UserError, match='banned'):
    make(banned_ids=range(V), stop_ids=[])
  with pytest.raises(UserError, match='No stop id'):
    make(stop_ids=[V, 1000])
  with pytest.raises(UserError, match='No stop id'):
    make(banned_ids=[3])
  one = jnp.ones((1, 1), jnp.int32)
  with pytest.raises(UserError, match='tokenizer has 65'):
    make(live_vocab=V + 1)(jnp.zeros((V, V)), one, one > 0, jax.random.key(0), jnp.arange(1))
