"""Filters against transformers' own processors."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as peer

from dopd_jax.rollout import Sampling, filters
from tests.models import tiny

B, V = 64, 211


def logits(kind, seed=0):
  x = np.random.default_rng(seed).normal(0, 3, (B, V)).astype(np.float32)
  if kind == 'ties':
    x = np.round(x)
  if kind == 'masked':
    x[:, 100:] = -np.inf
    x[1::2, 3:] = -np.inf  # fewer tokens than any k
  if kind == 'flat':
    x[:] = 0.5
  if kind == 'peaked':
    x[:, 7] += 60
  return x


def of_peer(processor, x):
  return processor(None, torch.tensor(x)).numpy()


@pytest.mark.parametrize('kind', ['random', 'ties', 'masked', 'flat', 'peaked'])
@pytest.mark.parametrize(
  'ours, theirs, values',
  [
    (filters.top_k, peer.TopKLogitsWarper, [1, 2, 5, 50, 210, 211, 1000]),
    (filters.top_p, peer.TopPLogitsWarper, [1e-8, 1e-6, 0.05, 0.3, 0.77, 0.9, 0.95, 0.999]),
    (filters.min_p, peer.MinPLogitsWarper, [0.0, 1e-3, 0.1, 0.5, 1.0]),
  ],
)
def test_as_transformers(kind, ours, theirs, values):
  x = logits(kind)
  for value in values:
    y = np.asarray(ours(jnp.asarray(x), value))
    z = of_peer(theirs(value), x)
    if ours is filters.top_p and kind in ('ties', 'flat'):
      y, z = np.sort(y), np.sort(z)  # which of its tied tokens a peer drops is an accident
    np.testing.assert_array_equal(y, z, err_msg=f'{value}')
    assert (y > -np.inf).any(axis=1).all()


def test_top_k_keeps_ties():
  x = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
  assert np.isfinite(filters.top_k(x, 2)).tolist() == [[True, False, True, True, True, False]]


def test_top_p_drops_the_smaller_ids_of_a_tie():
  x = jnp.zeros((1, 4))  # mass 1/4 each; removed while the mass is at most 1 - p
  assert np.isfinite(filters.top_p(x, 0.5)).tolist() == [[False, False, True, True]]
  assert np.isfinite(filters.top_p(x, 0.51)).tolist() == [[False, True, True, True]]


SAMPLINGS = [
  dict(temperature=0.7),
  dict(temperature=1.7, top_k=9),
  dict(temperature=0.6, top_k=20, top_p=0.95),
  dict(temperature=2.5, top_p=0.8, min_p=0.05),
  dict(temperature=1.3, top_k=30, top_p=0.9, min_p=0.1),
  dict(top_p=0.5),
  dict(min_p=0.3),
  dict(),
]


@pytest.mark.parametrize('settings', SAMPLINGS, ids=str)
def test_order_is_that_of_generate(settings):
  # The order lives in `generate` itself: compare with the scores that it sampled from.
  tokens = np.random.default_rng(1).integers(0, tiny.V, (16, 4))
  with torch.no_grad():
    out = tiny.torch_model().generate(
      torch.tensor(tokens),
      attention_mask=torch.ones(tokens.shape, dtype=torch.long),
      max_new_tokens=1,
      do_sample=True,
      pad_token_id=0,
      output_scores=True,
      output_logits=True,
      return_dict_in_generate=True,
      **{'top_k': 0, **settings},
    )
  ours = filters.filter_logits(
    jnp.asarray(out.logits[0].numpy()), Sampling(max_new_tokens=1, **settings)
  )
  theirs = out.scores[0].numpy()
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  if settings.keys() & {'top_k', 'top_p', 'min_p'}:
    assert not np.isfinite(theirs).all()  # or the filter did nothing
