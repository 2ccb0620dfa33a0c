"""What a decoder must keep, whatever its weights: cache, padding, batch, causality, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax.errors import UserError
from dopd_jax.models import build, drop_layers
from tests.models import tiny

both = pytest.mark.parametrize('kind', ['qwen3-tied', 'llama'])  # with and without q/k norm


def close(a, b, tolerance=2e-5):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=0)


@both
def test_cached_decoding_is_the_full_forward_at_every_step(kind):
  model, params = tiny.model(kind)
  prompt, steps = [5, 1, 3], 6
  P, T = 5, 5 + steps  # prompts are padded on the left, then all rows step together
  tokens, valid = tiny.batch([n + steps for n in prompt], T, 'left')
  full = tiny.logits(model, params, tokens, valid)
  tokens, valid = jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)
  forward = jax.jit(model.forward, donate_argnames='cache')

  cache = model.init_cache(len(prompt), T + 3)
  hidden, cache = forward(params, tokens[:, :P], valid[:, :P], cache=cache)
  got = [hidden]
  for t in range(P, T):
    hidden, cache = forward(params, tokens[:, t : t + 1], valid[:, t : t + 1], cache=cache)
    got.append(hidden)
  assert int(cache.index) == T
  np.testing.assert_array_equal(cache.position, [n + steps for n in prompt])
  np.testing.assert_array_equal(cache.valid[:, :T], valid)
  ours = jnp.concatenate(got, axis=1) @ model.head(params).T
  close(jnp.where(valid[..., None], ours - full, 0), 0)


@both
def test_cache_with_right_padded_prompts(kind):
  """Prompts padded on the right leave holes before the completion: nobody may look there."""
  model, params = tiny.model(kind)
  forward = jax.jit(model.forward)
  tokens, valid = tiny.batch([4, 2], 4, 'right')
  more, _ = tiny.batch([3, 3], 3, seed=1)
  _, cache = forward(params, tokens, valid, cache=model.init_cache(2, 7))
  hidden, _ = forward(params, more, np.ones((2, 3), bool), cache=cache)
  for row, n in enumerate([4, 2]):
    alone = np.concatenate([tokens[row, :n], more[row]])[None]
    expected, _ = forward(params, alone, np.ones_like(alone, bool))
    close(hidden[row], expected[0, n:])


def test_a_finished_row_does_not_move():
  """Steps of a row that is done are not valid: its position stays."""
  model, params = tiny.model()
  forward = jax.jit(model.forward)
  tokens = jnp.ones((2, 1), jnp.int32)
  cache = model.init_cache(2, 4)
  _, cache = forward(params, tokens, jnp.array([[True], [True]]), cache=cache)
  _, cache = forward(params, tokens, jnp.array([[True], [False]]), cache=cache)
  np.testing.assert_array_equal(cache.position, [2, 1])


def test_the_cache_is_updated_in_place():
  """One buffer for keys and one for values: a step writes into the donated cache."""
  model, params = tiny.model()
  cache = model.init_cache(2, 4096)
  tokens, valid = jnp.ones((2, 1), jnp.int32), jnp.ones((2, 1), bool)
  step = jax.jit(model.forward, donate_argnames='cache')
  memory = step.lower(params, tokens, valid, cache=cache).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
  # Temporaries hold a layer's keys and values and what attention makes of them: no second cache.
  assert memory.temp_size_in_bytes < cache.k.nbytes


def test_a_cache_that_is_too_short_is_an_error():
  model, params = tiny.model()
  tokens, valid = jnp.ones((1, 5), jnp.int32), jnp.ones((1, 5), bool)
  with pytest.raises(ValueError, match='5 tokens do not fit a cache of 4'):
    jax.eval_shape(lambda: model.forward(params, tokens, valid, cache=model.init_cache(1, 4)))


@both
@pytest.mark.parametrize('side', ['left', 'right'])
def test_rows_and_padding_do_not_matter(kind, side):
  """A row of a ragged batch is that row alone, whatever stands in the padding."""
  model, params = tiny.model(kind)
  lengths = [11, 6, 1]
  tokens, valid = tiny.batch(lengths, 11, side)
  together = tiny.logits(model, params, tokens, valid)
  for row, n in enumerate(lengths):
    alone = tiny.logits(model, params, tokens[row][valid[row]][None], np.ones((1, n), bool))
    close(together[row][valid[row]], alone[0])
  junk = np.where(valid, tokens, tokens[::-1] // 2)
  close(tiny.logits(model, params, junk, valid)[valid], together[valid], 0)


@pytest.mark.parametrize('cached', [False, True])
def test_causal_by_gradient(cached):
  """hidden[t] has a gradient for every valid token up to t, and for no other."""
  model, params = tiny.model()
  T = 7
  tokens = jnp.arange(T, dtype=jnp.int32)[None] + 10
  valid = jnp.array([[False, True, True, False, True, True, True]])
  cache = model.init_cache(1, T + 2) if cached else None

  @jax.jit
  @jax.grad
  def table_gradient(table, t):
    tree = params | {'embedding': table}
    return jnp.sum(model.forward(tree, tokens, valid, cache=cache)[0][0, t] ** 2)

  gradients = [table_gradient(params['embedding'], t)[tokens[0]] for t in range(T)]
  seen = np.any(np.array(gradients) != 0, axis=-1)
  expected = np.tril(np.ones((T, T), bool)) & np.asarray(valid)
  keep = np.asarray(valid[0])
  np.testing.assert_array_equal(seen[keep], expected[keep])


def test_rows_without_a_token_are_finite():
  model, params = tiny.model()
  tokens, valid = jnp.ones((2, 4), jnp.int32), jnp.zeros((2, 4), bool)

  def loss(params):
    hidden, _ = model.forward(params, tokens, valid)
    return jnp.sum(jnp.where(valid[..., None], hidden, 0)), hidden

  (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert jnp.isfinite(hidden).all()
  assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_remat_changes_nothing():
  model, params = tiny.model()
  tokens, valid = tiny.batch([9, 5], 9)

  def gradient(remat):
    forward = build(model.config, remat=remat).forward
    loss = lambda p: jnp.sum(jnp.sin(forward(p, tokens, valid)[0]), where=valid[..., None])
    return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))

  (kept, plain), (again, remat) = gradient(False), gradient(True)
  jax.tree.map(lambda a, b: close(a, b, 1e-4), kept, again)
  assert 'remat' in remat and 'remat' not in plain


def test_bfloat16_stays_near_float32():
  """Parameters stay float32; activations and cache are bfloat16; drift is that of its 8 bits."""
  model, params = tiny.model()
  half = build(model.config, compute_dtype=jnp.bfloat16)
  tokens, valid = tiny.batch([12, 7], 12)
  exact, _ = jax.jit(model.forward)(params, tokens, valid)
  hidden, cache = jax.jit(half.forward)(params, tokens, valid, cache=half.init_cache(2, 12))
  assert hidden.dtype == cache.k.dtype == cache.v.dtype == jnp.bfloat16
  error = np.abs(np.asarray(hidden, np.float32) - np.asarray(exact))[valid]
  assert error.mean() < 0.02 * np.std(np.asarray(exact)[valid])


@both
def test_no_implicit_promotion(kind):
  half = build(tiny.config(kind), compute_dtype=jnp.bfloat16)
  tokens, valid = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool)

  def run(key):
    params, cache = half.init(key), half.init_cache(2, 4)
    return half.forward(params, tokens, valid), half.forward(params, tokens, valid, cache=cache)

  with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
    jax.eval_shape(run, jax.random.key(0))


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_the_tied_head_is_the_embedding(kind):
  model, params = tiny.model(kind)
  tied = model.config.tie_word_embeddings
  assert ('lm_head' in params) != tied
  moved = params | {'embedding': params['embedding'].at[7].add(1.0)}
  changed = np.any(np.asarray(model.head(moved)) != np.asarray(model.head(params)), axis=1)
  assert list(np.flatnonzero(changed)) == ([7] if tied else [])
  assert model.head(params).shape == (model.config.vocab_size, model.config.hidden_size)


def test_dropped_layers_are_copies():
  """A student cut out of its teacher owns its arrays: donating them deletes no teacher."""
  model, teacher = tiny.model()
  student, config = drop_layers(teacher, model.config, range(0, 3, 2))
  assert config.num_hidden_layers == 2
  for leaf in ('mlp_norm', 'attention_norm'):
    np.testing.assert_array_equal(student['layers'][leaf], teacher['layers'][leaf][::2])
  step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
  step(student)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(student))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher))


def test_keeping_every_layer_changes_nothing():
  model, params = tiny.model()
  same, config = drop_layers(params, model.config, range(3))
  assert config == model.config
  jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize('keep', [[], [3], [-1]])
def test_keeping_a_layer_that_is_not_there_is_an_error(keep):
  model, params = tiny.model()
  with pytest.raises(UserError, match='Cannot keep layers'):
    drop_layers(params, model.config, keep)


def test_init_depends_on_the_key_and_on_nothing_else():
  init = jax.jit(build(tiny.config()).init)
  one, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(one))
  up = np.asarray(one['layers']['mlp']['up_proj'])
  assert not np.array_equal(up[0], up[1])  # each layer has its own key
  assert not np.array_equal(up, other['layers']['mlp']['up_proj'])
  assert abs(np.std(up) - 0.2) < 0.01
