"""Qwen3-VL against transformers in float32, and what must hold whatever its weights.

`pytest -s` prints the largest difference of each comparison.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax.models import DecoderConfig, Features, Images, build, drop_layers, load
from tests.models import tiny_vl
from tests.models.tiny_vl import image, video

TOLERANCE = 1e-4
ROWS = {
  'text only': [[11], [5]],
  'one image': [[3, image(1, 4, 6), 5]],
  'two unequal images': [[2, image(1, 8, 4), 3, image(1, 2, 6), 4]],
  'image first and last': [[image(1, 4, 4), 6, image(1, 2, 4)]],
  'rows with and without': [[9], [2, image(1, 6, 6), 3], [1, image(1, 2, 2), 1, image(1, 4, 8), 2]],
  'video of 3 frames': [[3, video(3, 4, 6), 4], [6]],
  'video and image': [[2, video(2, 4, 4), 1, image(1, 6, 4), 3], [1, image(1, 2, 8), 8]],
  '300 tokens': [[100, image(1, 20, 20), 100], [250, image(1, 8, 24), 2]],
}


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module', params=['tied', 'untied'])
def pair(request, tmp_path_factory):
  """A transformers model and what we load of its directory."""
  directory = tmp_path_factory.mktemp(request.param)
  peer = tiny_vl.torch_model(tied=request.param == 'tied')
  peer.save_pretrained(directory)
  config, params = load(directory)
  return peer, build(config), params


def close(a, b, tolerance=2e-5):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=0)


def show(what, ours, theirs):
  difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
  print(f'\n{what}: {difference:.1e} of {np.std(theirs):.2f}', end='')
  return difference


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('rows', ROWS)
def test_logits(pair, rows, side):
  peer, model, params = pair
  data = tiny_vl.batch(ROWS[rows], side)
  ours = np.asarray(tiny_vl.logits(model, params, data))[data.valid]
  theirs = tiny_vl.torch_logits(peer, data)[data.valid]
  assert np.std(theirs) > 0.5  # a flat peer would agree with anything
  assert show(f'{rows}, padded {side}', ours, theirs) < TOLERANCE


def test_the_peer_tells_what_could_be_wrong(pair):
  """Positions, deepstack and the order of features are all far above the tolerance."""
  peer, model, params = pair
  data = tiny_vl.batch(ROWS['two unequal images'])
  theirs = tiny_vl.torch_logits(peer, data)
  features = tiny_vl.see(model, params, data)
  moved = Features(features.tokens[:, ::-1], features.deepstack)
  plain = features._replace(deepstack=features.deepstack * 0)
  for wrong in (moved, plain):
    assert np.abs(tiny_vl.logits(model, params, data, wrong) - theirs).max() > 0.1
  count = np.cumsum(data.valid, axis=1, dtype=np.int32) - 1
  hidden, _ = jax.jit(model.forward)(params, data.tokens, data.valid, count, features=features)
  assert np.abs(hidden @ model.head(params).T - theirs).max() > 0.1


def test_greedy_decoding_is_that_of_transformers(pair):
  """Prefill with images, then steps from the cache. Prompts end in text, as real ones do: behind a
  last feature transformers' generate counts each axis on by itself, unlike its own forward."""
  peer, model, params = pair
  rows = [[3, image(1, 2, 12), 1], [8, image(1, 8, 8), 2], [5]]
  data = tiny_vl.batch(rows, 'left')
  inputs = tiny_vl.torch_inputs(data)
  steps, P = 8, data.tokens.shape[1]
  options = dict(do_sample=False, min_new_tokens=steps, max_new_tokens=steps, pad_token_id=0)
  theirs = peer.generate(**inputs, **options, eos_token_id=None)[:, P:].numpy()

  forward = jax.jit(model.forward)
  hidden, cache = forward(
    params,
    data.tokens,
    data.valid,
    tiny_vl.positions(model, data),
    cache=model.init_cache(len(rows), P + steps),
    features=tiny_vl.see(model, params, data),
  )
  ours = []
  for _ in range(steps):
    ours.append(jnp.argmax(hidden[:, -1] @ model.head(params).T, axis=-1))
    hidden, cache = forward(params, ours[-1][:, None], np.ones((3, 1), bool), cache=cache)
  np.testing.assert_array_equal(np.stack(ours, axis=1), theirs)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_cached_decoding_is_the_full_forward(side):
  """The position behind an image is the row's largest + 1, on all three axes."""
  model, params = tiny_vl.model()
  rows = [[4, image(1, 2, 12)], [2, image(1, 8, 8), 3], [6]]
  steps = 5
  prompt = tiny_vl.batch(rows, side)
  B, P = prompt.tokens.shape
  more = np.random.default_rng(1).integers(0, 200, (B, steps))
  features = tiny_vl.see(model, params, prompt)

  forward = jax.jit(model.forward)
  places = tiny_vl.positions(model, prompt)
  cache = model.init_cache(B, P + steps)
  _, cache = forward(params, prompt.tokens, prompt.valid, places, cache=cache, features=features)
  np.testing.assert_array_equal(cache.position, [4 + 6, 2 + 4 + 3, 6])
  got = []
  for t in range(steps):
    hidden, cache = forward(params, more[:, t : t + 1], np.ones((B, 1), bool), cache=cache)
    got.append(hidden)
  got = jnp.concatenate(got, axis=1)

  longer = prompt._replace(
    tokens=np.concatenate([prompt.tokens, more], axis=1),
    valid=np.concatenate([prompt.valid, np.ones((B, steps), bool)], axis=1),
  )
  places = tiny_vl.positions(model, longer)
  np.testing.assert_array_equal(places[:, -1].max(axis=-1) + 1, cache.position)
  full, _ = forward(params, longer.tokens, longer.valid, places, features=features)
  close(got, full[:, P:])


def test_v3_markers_of_left_padded_rows():
  """Rows of 4 and 7 tokens, padded left: each finds its own image, whatever the padding holds."""
  model, params = tiny_vl.model()
  data = tiny_vl.batch([[1, image(1, 2, 4), 1], [2, image(1, 2, 6), 2]], 'left')
  assert data.valid.sum(axis=1).tolist() == [4, 7]
  together = np.asarray(tiny_vl.logits(model, params, data))
  for b in range(2):
    row = [b, slice(b, b + 1)]
    alone = tiny_vl.Batch(
      data.tokens[row[1]][:, data.valid[b]],
      data.valid[row[1]][:, data.valid[b]],
      Images(*(x[row[1]] for x in data.images)),
      {},
      {},
    )
    close(together[b][data.valid[b]], tiny_vl.logits(model, params, alone)[0])


def test_v8_deepstack_is_added(pair):
  """Each of its features moves the logits behind it; none moves what stands before."""
  _, model, params = pair
  data = tiny_vl.batch([[3, image(1, 4, 4), 5]])
  features = tiny_vl.see(model, params, data)
  with_it = tiny_vl.logits(model, params, data, features)
  for k in range(len(model.config.vision.deepstack_indexes)):
    without = features._replace(deepstack=features.deepstack.at[:, k].set(0))
    moved = np.abs(with_it - tiny_vl.logits(model, params, data, without))[0].max(axis=-1)
    assert (moved[3:] > 1e-3).all() and (moved[:3] == 0).all()


def test_v12_features_once_for_repeated_rows():
  model, params = tiny_vl.model()
  one = tiny_vl.batch([[2, image(1, 4, 4), 3], [1, image(1, 2, 4), 2, image(1, 2, 2), 1]])
  M = 3
  repeat = lambda x, axis=0: np.repeat(np.asarray(x), M, axis=axis)
  many = one._replace(
    tokens=repeat(one.tokens), valid=repeat(one.valid), images=Images(*map(repeat, one.images))
  )
  features = tiny_vl.see(model, params, one)
  once = Features(repeat(features.tokens), repeat(features.deepstack))
  each = tiny_vl.see(model, params, many)
  jax.tree.map(close, once, each)
  close(tiny_vl.logits(model, params, many, once), tiny_vl.logits(model, params, many, each))


def test_v13_black_and_white():
  """The log-probs of the text behind an image depend on it, those before it do not."""
  model, params = tiny_vl.model()
  data = tiny_vl.batch([[3, image(1, 4, 4), 5]])
  black, white = (
    jax.nn.log_softmax(
      tiny_vl.logits(
        model,
        params,
        data._replace(images=data.images._replace(patches=np.full((1, 1, 16, tiny_vl.C), value))),
      )
    )
    for value in (np.float32(-1), np.float32(1))
  )
  moved = np.abs(black - white)[0].max(axis=-1)
  assert (moved[7:] > 1e-2).all() and (moved[:3] == 0).all()


@pytest.mark.parametrize('remat', [True, False])
def test_gradient_is_that_of_transformers(pair, remat):
  """Through forward and see, of every parameter of both; padding and unused slots give none."""
  peer, model, params = pair
  model = build(model.config, remat=remat)
  data = tiny_vl.batch([[3, image(1, 4, 6), 5], [2, image(1, 2, 4), 1, video(2, 4, 4), 1], [4]])
  places = tiny_vl.positions(model, data)
  weight = np.random.default_rng(0).normal(size=(*data.tokens.shape, tiny_vl.V))
  weight = (weight * data.valid[:, :, None]).astype(np.float32)

  def loss(params):
    features = model.see(params, data.images)
    hidden, _ = model.forward(params, data.tokens, data.valid, places, features=features)
    return jnp.sum(hidden @ model.head(params).T * weight)

  ours = jax.jit(jax.grad(loss))(params)
  import torch

  peer.zero_grad()
  (peer(**tiny_vl.torch_inputs(data)).logits * torch.tensor(weight)).sum().backward()
  theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
  worst = 0.0
  for slot in _slots(model.config, ours):
    expected = theirs[slot.name].numpy()
    got = slot.to_hf(_leaf(ours, slot.leaf))
    assert np.abs(expected).max() > 0, slot.name
    worst = max(worst, np.abs(got - expected).max() / np.abs(expected).max())
  print(f'\ngradient, largest relative difference of {len(theirs)} tensors: {worst:.1e}', end='')
  assert worst < 1e-3


def _leaf(tree, path):
  for key in path.split('/'):
    tree = tree[key]
  return tree


def _slots(config, params):
  from dopd_jax.models import names

  leaves = jax.tree_util.tree_leaves_with_path(params)
  path = lambda p: jax.tree_util.keystr(p, simple=True, separator='/')
  return list(names.slots(config, {path(p): leaf for p, leaf in leaves}))


def test_text_costs_what_it_costs_without_a_tower():
  """A batch of text compiles to the program of the plain decoder, to the letter."""
  model, params = tiny_vl.model()
  text = {name: leaf for name, leaf in params.items() if name != 'vision'}
  config = DecoderConfig(
    **{**vars(model.config), 'vision': None, 'mrope_section': None},
  )
  tokens, valid = np.ones((2, 7), np.int32), np.ones((2, 7), bool)
  lowered = lambda m: jax.jit(m.forward).lower(text, tokens, valid, cache=m.init_cache(2, 9))
  assert lowered(model).as_text() == lowered(build(config)).as_text()
  assert 'f32[32' not in lowered(model).as_text()  # the tower's width


def test_the_stack_of_layers_is_scanned_once_and_whole():
  """Deepstack slices no stacked parameter: a copy of the first layers would cost their memory."""
  model, params = tiny_vl.model()
  data = tiny_vl.batch([[3, image(1, 4, 4), 5]])
  features = tiny_vl.see(model, params, data)
  jaxpr = jax.make_jaxpr(model.forward)(
    params, data.tokens, data.valid, tiny_vl.positions(model, data), features=features
  )
  scans = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == 'scan']
  assert [e.params['length'] for e in scans] == [4]
  scanned = {id(v) for v in scans[0].invars}
  kept = jax.tree.leaves(jax.tree.map(lambda _: True, params['layers']))
  assert sum(id(v) in scanned for v in jaxpr.jaxpr.invars) >= len(kept)


def test_no_implicit_promotion():
  half = build(tiny_vl.config(), compute_dtype=jnp.bfloat16)
  data = tiny_vl.batch([[3, image(1, 4, 4), 5]])
  places = jnp.asarray(tiny_vl.positions(half, data))

  def run(key, tokens, valid, images):
    params, cache = half.init(key), half.init_cache(1, 12)
    features = half.see(params, images)
    return features, half.forward(params, tokens, valid, places, cache, features)

  with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
    features, (hidden, _) = jax.eval_shape(
      run, jax.random.key(0), jnp.asarray(data.tokens), jnp.asarray(data.valid), data.images
    )
  assert features.tokens.dtype == features.deepstack.dtype == hidden.dtype == jnp.bfloat16


def test_bfloat16_stays_near_float32():
  model, params = tiny_vl.model()
  half = build(model.config, compute_dtype=jnp.bfloat16)
  data = tiny_vl.batch([[3, image(1, 4, 6), 5], [4]])
  exact = np.asarray(tiny_vl.logits(model, params, data))[data.valid]
  got = np.asarray(tiny_vl.logits(half, params, data), np.float32)[data.valid]
  assert np.abs(got - exact).mean() < 0.03 * np.std(exact)


def test_dropped_layers_keep_the_tower():
  """With fewer layers than deepstack features the last ones are left out, as transformers does."""
  model, params = tiny_vl.model()
  data = tiny_vl.batch([[3, image(1, 4, 4), 5]])
  for keep in ([0, 2], [1]):
    fewer, config = drop_layers(params, model.config, keep)
    assert np.isfinite(tiny_vl.logits(build(config), fewer, data)).all()
    assert fewer['vision']['patch_proj'] is not params['vision']['patch_proj']


def test_a_model_of_text_alone_sees_nothing():
  model, params = tiny_vl.model()
  plain = build(DecoderConfig(**{**vars(model.config), 'vision': None, 'mrope_section': None}))
  data = tiny_vl.batch([[3, image(1, 4, 4), 5]])
  assert plain.see is None
  places, features = tiny_vl.positions(model, data), tiny_vl.see(model, params, data)
  for given, words in (
    ({'features': features, 'positions': places}, 'no vision tower'),
    ({'positions': places}, r'positions \[B, T\]'),
  ):
    with pytest.raises(ValueError, match=words):
      plain.forward(params, data.tokens, data.valid, **given)
  with pytest.raises(ValueError, match='vision_positions'):
    model.forward(params, data.tokens, data.valid, features=features)
