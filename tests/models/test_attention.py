"""Attention in blocks of queries is attention: values, gradients, and memory, its reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax.models import layers

B, T, S, Q, K, H = 2, 21, 25, 4, 2, 6


def inputs(quantised=False):
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, ((B, T, Q, H), (B, S, K, H), (B, S, K, H)))
  )
  # Causal behind what is cached already; one query looks nowhere, one row has padding on its left.
  mask = (
    jnp.tril(jnp.ones((T, S), bool), S - T)[None]
    & (jnp.arange(S) >= jnp.array([[0], [3]]))[:, None]
  )
  mask = mask.at[0, 7].set(False)
  if not quantised:
    return q, k, v, mask
  (k, k_scale), (v, v_scale) = layers.quantize(k), layers.quantize(v)
  return q, k, v, mask, k_scale, v_scale


@pytest.mark.parametrize('block', [1, 4, 7, 20])
@pytest.mark.parametrize('quantised', [False, True])
def test_blocks_change_nothing(block, quantised, monkeypatch):
  given = inputs(quantised)
  whole = layers.attention(*given)
  monkeypatch.setattr(layers, 'BLOCK', block)
  np.testing.assert_allclose(layers.attention(*given), whole, atol=1e-6)


def test_one_mask_for_all_queries_is_broadcast(monkeypatch):
  q, k, v, mask = inputs()
  whole = layers.attention(q, k, v, mask[:, -1:])
  monkeypatch.setattr(layers, 'BLOCK', 8)
  np.testing.assert_allclose(layers.attention(q, k, v, mask[:, -1:]), whole, atol=1e-6)


def test_gradients_are_the_same(monkeypatch):
  q, k, v, mask = inputs()
  there = mask.any(-1)[..., None, None]
  loss = lambda q, k, v: jnp.sum(jnp.sin(layers.attention(q, k, v, mask)) * there)
  grad = jax.grad(loss, (0, 1, 2))
  whole = grad(q, k, v)
  monkeypatch.setattr(layers, 'BLOCK', 8)
  for ours, theirs in zip(grad(q, k, v), whole):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs).max() > 0.1


def test_bfloat16_gradients_of_keys_lose_nothing_to_the_blocks(monkeypatch):
  """A key's gradient is a sum over blocks: in bfloat16 it would lose a bit at each of them."""
  q, k, v = (x.astype(jnp.bfloat16) for x in inputs()[:3])
  q, mask = jnp.tile(q, (1, 16, 1, 1)), jnp.ones((B, 16 * T, S), bool)
  loss = lambda q, k, v: jnp.sum(layers.attention(q, k, v, mask).astype(jnp.float32) ** 2)
  grad = lambda *x: [g.astype(jnp.float32) for g in jax.grad(loss, (1, 2))(*x)]
  monkeypatch.setattr(layers, 'BLOCK', 16 * T)
  exact = grad(*(x.astype(jnp.float32) for x in (q, k, v)))
  error = lambda found: [np.abs(a - b).mean() for a, b in zip(found, exact)]
  whole = error(grad(q, k, v))
  monkeypatch.setattr(layers, 'BLOCK', 4)
  for ours, theirs in zip(error(grad(q, k, v)), whole):
    assert ours < 1.2 * theirs


def test_scores_of_all_queries_never_exist(monkeypatch):
  """Forward and backward of 1,024 tokens in blocks of 128 take a quarter of the memory."""
  x = jax.ShapeDtypeStruct((1, 1024, 4, 16), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 1024, 1024), bool)

  def temporaries(block):
    monkeypatch.setattr(layers, 'BLOCK', block)
    loss = lambda q, k, v, mask: jnp.sum(layers.attention(q, k, v, mask) ** 2)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert 4 * temporaries(128) < temporaries(1024)


@pytest.mark.skipif(
  jax.default_backend() != 'gpu', reason='cuDNN needs a GPU: DOPD_JAX_TEST_PLATFORM=cuda'
)
def test_cudnn_is_as_near_to_float32_as_the_blocks_are(monkeypatch):
  """Values and gradients in bfloat16; a row with padding on its left, queries that look nowhere."""
  keys = jax.random.split(jax.random.key(0), 3)
  make = lambda key, heads: jax.random.normal(key, (B, 512, heads, 64), jnp.bfloat16)
  q, k, v = (make(key, n) for key, n in zip(keys, (4, 2, 2)))
  mask = jnp.tri(512, dtype=bool) & (jnp.arange(512) >= jnp.array([[0], [37]]))[:, None]
  there = mask.any(-1)[..., None, None]

  def values_and_gradients(q, k, v):
    fn = lambda q, k, v: jnp.where(there, layers.attention(q, k, v, mask), 0).astype(jnp.float32)
    grads = jax.grad(lambda *x: jnp.sum(fn(*x) ** 2), (0, 1, 2))(q, k, v)
    return [x.astype(jnp.float32) for x in (fn(q, k, v), *grads)]

  with jax.default_matmul_precision('highest'):
    exact = values_and_gradients(*(x.astype(jnp.float32) for x in (q, k, v)))
  error = lambda found: [float(jnp.abs(a - b).mean()) for a, b in zip(found, exact)]
  assert layers._suits_cudnn(q, k)
  ours = error(values_and_gradients(q, k, v))
  monkeypatch.setattr(layers, '_suits_cudnn', lambda q, k: False)
  for cudnn, blocks in zip(ours, error(values_and_gradients(q, k, v))):
    assert cudnn < 1.5 * blocks
