"""The sampler on the real decoder: against transformers, and against the full forward."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dopd_jax.models import build, load
from dopd_jax.rollout import Sampling, StopReason, caches, make_sampler
from tests.models import tiny
from tests.rollout import toy

V = tiny.V
LENGTHS = [5, 12, 1, 9]


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision('highest'):
    yield


def prompts(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, V, n).tolist() for n in lengths]


def run(model, params, tokens, valid, sampling, records=None, stop_ids=(), key=0, **settings):
  settings = {'pad_id': 0, 'live_vocab': V, **settings}
  sample = make_sampler(model, sampling, stop_ids=stop_ids, **settings)
  records = np.arange(len(tokens)) if records is None else np.asarray(records)
  return jax.jit(sample)(params, tokens, valid, jax.random.key(key), records)


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_greedy_ids_are_those_of_transformers(kind, tmp_path):
  peer = tiny.torch_model(kind)
  peer.save_pretrained(tmp_path)
  config, params = load(tmp_path)
  tokens, valid = toy.pad_prompts(prompts(LENGTHS), 16, pad_id=0)
  N = 20

  def theirs(stop_ids):
    with torch.no_grad():
      return peer.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(valid.astype(np.int64)),
        max_new_tokens=N,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=0,
      )[:, tokens.shape[1] :].numpy()

  free = theirs([V + 1])
  assert len(np.unique(free)) > 10  # a peer that repeats itself would prove little
  # Two rows stop somewhere; the others would without our stop ids too, or run to the end.
  stop_ids = [int(free[0, 7]), int(free[1, 11])]
  stopped = theirs(stop_ids)
  greedy = Sampling(max_new_tokens=N, temperature=0.0)
  ours = run(build(config), params, tokens, valid, greedy, stop_ids=stop_ids)
  np.testing.assert_array_equal(ours.tokens[:, : stopped.shape[1]], stopped)
  stops = np.isin(free, stop_ids)
  assert 2 <= stops.any(axis=1).sum() < 4
  lengths = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, N)
  np.testing.assert_array_equal(ours.mask.sum(axis=1), lengths)
  np.testing.assert_array_equal(ours.stop_reason == StopReason.STOP, stops.any(axis=1))


def recompute(model, params, rows, completions, temperature):
  """Log-probs [B, N] of the trainer: one forward of packed, right-padded prompt + completion."""
  packed = [list(p) + list(c) for p, c in zip(rows, completions)]
  T = max(len(x) for x in packed)
  tokens = np.zeros((len(rows), T), np.int32)
  valid = np.zeros((len(rows), T), bool)
  for i, x in enumerate(packed):
    tokens[i, : len(x)], valid[i, : len(x)] = x, True
  logits = tiny.logits(model, params, tokens, valid) / temperature
  logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  out = [
    [logp[i, len(p) - 1 + j, c[j]] for j in range(len(c))]
    for i, (p, c) in enumerate(zip(rows, completions))
  ]
  return out


@pytest.mark.parametrize(
  'kind, settings',
  [
    ('qwen3-tied', dict()),
    ('qwen3-untied', dict(temperature=0.6, top_k=20, top_p=0.9)),
    ('llama', dict(loss_temperature=1.7)),
  ],
)
def test_logp_is_what_the_trainer_recomputes(kind, settings):
  model, params = tiny.model(kind)
  rows = prompts(LENGTHS)
  tokens, valid = toy.pad_prompts(rows, 16, pad_id=0)
  sampling = Sampling(max_new_tokens=20, num_samples=3, **settings)
  rollout = run(model, params, tokens, valid, sampling, stop_ids=range(6))
  lengths = np.asarray(rollout.mask.sum(axis=1))
  assert lengths.min() < 20 and len(set(lengths)) > 3
  completions = [row[:n] for row, n in zip(np.asarray(rollout.tokens), lengths)]
  again = recompute(
    model, params, [r for r in rows for _ in range(3)], completions, sampling.loss_temperature
  )
  for ours, full in zip(np.asarray(rollout.logp), again):
    np.testing.assert_allclose(ours[: len(full)], full, atol=1e-4)


def test_padding_side_and_bucket_do_not_matter():
  model, params = tiny.model()
  rows = prompts(LENGTHS)
  sampling = Sampling(max_new_tokens=10, num_samples=2)
  sample = jax.jit(make_sampler(model, sampling, stop_ids=(), pad_id=0, live_vocab=V))
  rollouts = []
  for P in (12, 17):
    for side in ('left', 'right', 'both'):
      tokens = np.full((len(rows), P), 7, np.int32)
      valid = np.zeros((len(rows), P), bool)
      for i, row in enumerate(rows):
        room = P - len(row)
        start = {'left': room, 'right': 0, 'both': room // 2}[side]
        tokens[i, start : start + len(row)] = row
        valid[i, start : start + len(row)] = True
      rollouts.append(sample(params, tokens, valid, jax.random.key(0), np.arange(4)))
  for other in rollouts[1:]:
    np.testing.assert_array_equal(other.tokens, rollouts[0].tokens)
    np.testing.assert_allclose(other.logp, rollouts[0].logp, atol=1e-5)


def test_completions_of_one_prefill_are_those_of_separate_rows():
  model, params = tiny.model()
  tokens, valid = toy.pad_prompts(prompts([7, 3, 5]), 8, pad_id=0)
  sampling = Sampling(max_new_tokens=12, num_samples=4)
  together = run(model, params, tokens, valid, sampling)
  # One prompt alone, and the first sample of each alone.
  alone = run(model, params, tokens[1:2], valid[1:2], sampling, records=[1])
  np.testing.assert_array_equal(together.tokens[4:8], alone.tokens)
  np.testing.assert_allclose(together.logp[4:8], alone.logp, atol=1e-5)
  first = run(model, params, tokens, valid, Sampling(max_new_tokens=12))
  np.testing.assert_array_equal(together.tokens[::4], first.tokens)
  np.testing.assert_allclose(together.logp[::4], first.logp, atol=1e-5)

  greedy = dict(max_new_tokens=12, temperature=0.0)
  several = run(model, params, tokens, valid, Sampling(num_samples=4, **greedy))
  repeated = run(
    model, params, np.repeat(tokens, 4, axis=0), np.repeat(valid, 4, axis=0), Sampling(**greedy)
  )
  np.testing.assert_array_equal(several.tokens, repeated.tokens)
  np.testing.assert_allclose(several.logp, repeated.logp, atol=1e-5)


def test_prompts_are_read_once():
  model, params = tiny.model()
  shapes = []

  def forward(params, tokens, valid, **kwargs):
    shapes.append(tokens.shape)
    return model.forward(params, tokens, valid, **kwargs)

  tokens, valid = toy.pad_prompts(prompts([7, 3]), 8, pad_id=0)
  run(
    model._replace(forward=forward),
    params,
    tokens,
    valid,
    Sampling(max_new_tokens=4, num_samples=5),
  )
  assert set(shapes) == {(2, 8), (10, 1)}  # of both prompts at once, then a token a row


def test_a_growing_cache_changes_nothing(monkeypatch):
  model, params = tiny.model()
  tokens, valid = toy.pad_prompts(prompts([7, 3]), 8, pad_id=0)
  sampling = Sampling(max_new_tokens=40, num_samples=2)
  assert caches.lengths(8, 40) == [47]
  whole = run(model, params, tokens, valid, sampling)
  monkeypatch.setattr(caches, '_SHORTEST', 5)
  assert caches.lengths(8, 40) == [11, 23, 47]
  grown = run(model, params, tokens, valid, sampling)
  np.testing.assert_array_equal(whole.tokens, grown.tokens)
  np.testing.assert_allclose(whole.logp, grown.logp, atol=1e-5)


@pytest.mark.parametrize('P, N', [(1, 1), (32, 128), (600, 1), (512, 4096), (255, 3), (300, 3000)])
def test_cache_lengths(P, N):
  lengths = caches.lengths(P, N)
  assert lengths[-1] == P + N - 1  # the last token is never fed
  assert lengths[0] >= P
  assert all(2 * a <= b <= 2 * a + 1 for a, b in itertools.pairwise(lengths))


def test_one_compilation_a_bucket():
  model, params = tiny.model()
  inner = make_sampler(model, Sampling(max_new_tokens=4), stop_ids=[3], pad_id=0, live_vocab=V)
  traced = []  # jax's own count of a function's programs falls when others push them out

  @jax.jit
  def sample(params, tokens, *rest):
    traced.append(tokens.shape)
    return inner(params, tokens, *rest)

  for n, length in enumerate([17, 18, 19, 32, 1]):
    tokens, valid = toy.pad_prompts(prompts([length, 2]), 32, pad_id=0)
    sample(params, tokens, valid, jax.random.key(n), np.arange(2) + n)
  assert traced == [(2, 32)]
  tokens, valid = toy.pad_prompts(prompts([33, 2]), 32, pad_id=0)
  sample(params, tokens, valid, jax.random.key(0), np.arange(2))
  assert traced == [(2, 32), (2, 64)]


def test_bfloat16_decoder_and_strict_promotion():
  with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
    table = jnp.zeros((V, V), jnp.bfloat16)
    filters = dict(temperature=0.6, top_k=20, top_p=0.9, min_p=0.01, loss_temperature=1.2)
    for settings in (filters, {}, dict(temperature=0)):
      tokens = jnp.zeros((2, 3), jnp.int32)
      sampling = Sampling(max_new_tokens=4, num_samples=2, **settings)
      rollout = run(toy.markov(), table, tokens, tokens == 0, sampling, stop_ids=[3])
      assert rollout.logp.dtype == rollout.behaviour_logp.dtype == jnp.float32
  model, params = tiny.model(dtype=jnp.bfloat16)
  tokens, valid = toy.pad_prompts(prompts(LENGTHS), 16, pad_id=0)
  rollout = run(model, params, tokens, valid, Sampling(max_new_tokens=8))
  assert rollout.logp.dtype == jnp.float32 and np.isfinite(rollout.logp).all()
