"""The vision tower layer by layer against transformers; its padding; and positions of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dopd_jax import sharding
from dopd_jax.errors import UserError
from dopd_jax.models import PRESETS, Images, build, load, vision, vision_positions
from tests.models import tiny, tiny_vl
from tests.models.tiny_vl import END, IMAGE, START, VIDEO, image, video

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision('highest'):
    yield


def close(a, b, tolerance=2e-5):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=0)


def show(what, ours, theirs):
  difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
  print(f'\n{what}: {difference:.1e} of {np.std(theirs):.2f}', end='')
  return difference


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """A transformers model whose deepstack reads every block, and what we load of its directory."""
  directory = tmp_path_factory.mktemp('vl')
  peer = tiny_vl.torch_model(deepstack=(0, 1, 2))
  peer.save_pretrained(directory)
  config, params = load(directory)
  return peer, build(config), params


def tower(config, params):
  made = nnx.eval_shape(lambda: vision.VisionTower(config, rngs=nnx.Rngs(0)))
  return nnx.merge(nnx.graphdef(made), params)


def one_block(config, params, i):
  """The tower with block i alone."""
  params = {k: v for k, v in params.items() if k != 'deepstack_mergers'}
  params['blocks'] = jax.tree.map(lambda leaf: leaf[i : i + 1], params['blocks'])
  return tower(dataclasses.replace(config, depth=1, deepstack_indexes=()), params)


GRIDS = [(1, 4, 6), (1, 8, 2), (3, 4, 4)]  # unequal images, and a video


def test_layer_by_layer(pair):
  """Patches and positions, every block, the merger and each deepstack merger."""
  import torch

  peer, model, params = pair
  data = tiny_vl.batch([[image(*grid) for grid in GRIDS]])
  visual, seen = peer.model.visual, []
  for block in visual.blocks:
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
  with torch.no_grad():
    out = visual(torch.tensor(data.pixels[IMAGE]), grid_thw=torch.tensor(data.grids[IMAGE]))
  visual.blocks[0]._forward_pre_hooks.clear()
  seen.append(out.last_hidden_state.numpy())

  config, ours = model.config.vision, params['vision']
  n, P = data.images.patches.shape[1:3]
  place = vision.locate(jnp.asarray(data.images.grid[0]), P, 2)
  real = np.asarray(place.valid)
  assert real.sum(axis=1).tolist() == [24, 16, 48]
  x = tower(config, ours).embed(jnp.asarray(data.images.patches[0]), place)
  assert show('patches and positions', x[real], seen[0]) < TOLERANCE
  for i in range(3):
    given = np.zeros((n, P, 32), np.float32)
    given[real] = seen[i]
    got, _ = one_block(config, ours, i).run(jnp.asarray(given), place, remat=False)
    assert show(f'block {i}', got[real], seen[i + 1]) < TOLERANCE

  features = tiny_vl.see(model, params, data)
  count = 22
  assert features.tokens.shape == (1, 3 * 48 // 4, 48)
  assert show('merger', features.tokens[0, :count], out.pooler_output.numpy()) < TOLERANCE
  for k, theirs in enumerate(out.deepstack_features):
    assert show(f'deepstack {k}', features.deepstack[0, k, :count], theirs.numpy()) < TOLERANCE
  assert not features.tokens[0, count:].any() and not features.deepstack[0, :, count:].any()


def test_padding_changes_nothing():
  """Neither what stands in padded patches, nor how many there are, nor empty places for images."""
  model, params = tiny_vl.model()
  rows = [[image(1, 4, 6), image(2, 2, 4)], [2], [image(1, 2, 2)]]
  tight, wide = tiny_vl.batch(rows), tiny_vl.batch(rows, P=40, I=4)
  assert np.isnan(tight.images.patches).any()
  features, padded = (tiny_vl.see(model, params, data) for data in (tight, wide))
  F = features.tokens.shape[1]
  for got, expected in zip(padded, features):
    assert np.isfinite(got).all() and not got[..., F:, :].any()
    close(got[..., :F, :], expected)
  junk = np.where(np.isnan(tight.images.patches), 1e4, tight.images.patches)
  again = tiny_vl.see(model, params, tight._replace(images=tight.images._replace(patches=junk)))
  jax.tree.map(np.testing.assert_array_equal, again, features)
  assert not features.tokens[1].any()


def test_each_image_is_that_image_alone():
  """Compacted in the order of a row: image 2 begins where image 1 ends."""
  model, params = tiny_vl.model()
  shapes = [(1, 4, 6), (1, 2, 2), (1, 6, 4)]
  data = tiny_vl.batch([[image(*shape) for shape in shapes]])
  together = tiny_vl.see(model, params, data)
  start = 0
  for i, (_, h, w) in enumerate(shapes):
    n = h * w // 4
    one = Images(data.images.patches[:, i : i + 1, : h * w], data.images.grid[:, i : i + 1])
    alone = jax.jit(model.see)(params, one)
    close(together.tokens[:, start : start + n], alone.tokens)
    close(together.deepstack[:, :, start : start + n], alone.deepstack)
    start += n


def test_a_frame_sees_itself_alone():
  model, params = tiny_vl.model()
  data = tiny_vl.batch([[video(3, 4, 4)]])
  moved = data.images.patches.copy()
  moved[:, :, 16:32] += 1
  before, after = (
    tiny_vl.see(model, params, data._replace(images=data.images._replace(patches=patches)))
    for patches in (data.images.patches, moved)
  )
  change = np.abs(np.asarray(after.tokens - before.tokens))[0].max(axis=-1).reshape(3, 4)
  assert (change[1] > 1e-3).all() and (change[[0, 2]] == 0).all()


def test_patches_that_make_no_whole_features():
  model, params = tiny_vl.model()
  with pytest.raises(ValueError, match='6 patches do not make whole features of 4'):
    model.see(params, Images(jnp.ones((1, 1, 6, tiny_vl.C)), jnp.ones((1, 1, 3), jnp.int32)))


def processor(config, **options):
  pytest.importorskip('PIL')
  from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

  sizes = dict(
    patch_size=config.patch_size,
    merge_size=config.spatial_merge_size,
    temporal_patch_size=config.temporal_patch_size,
  )
  return Qwen2VLImageProcessorPil(**sizes, **options)


def test_patches_stand_where_the_processor_puts_them():
  """An image whose pixels say their own row and column, through transformers' processor."""
  config = tiny_vl.config().vision
  plain = dict(do_resize=False, do_rescale=False, do_normalize=False)
  h, w = 6, 8
  row, column = np.indices((h, w)).repeat(4, axis=1).repeat(4, axis=2)
  pixels = np.stack([row, column, 0 * row], axis=-1).astype(np.float32)
  out = processor(config, **plain)([pixels], return_tensors='np', input_data_format='channels_last')
  assert out['image_grid_thw'].tolist() == [[1, h, w]]
  values = out['pixel_values'].reshape(h * w, 3, -1)
  assert values.shape[1] * values.shape[2] == config.patch_values
  place = vision.locate(jnp.array([[1, h, w]]), h * w, 2)
  np.testing.assert_array_equal(place.row[0], values[:, 0, 0])
  np.testing.assert_array_equal(place.column[0], values[:, 1, 0])


def test_v6_published_patches_are_of_16_pixels():
  """320 x 320 pixels make 100 tokens, not the 121 of patches of 14."""
  pytest.importorskip('PIL')
  from PIL import Image

  config = PRESETS['qwen3-vl-2b']
  out = processor(config.vision)([Image.new('RGB', (320, 320))], return_tensors='np')
  assert out['pixel_values'].shape == (400, config.vision.patch_values)
  grid = out['image_grid_thw'][None]
  for count, good in ((100, True), (121, False)):
    tokens = np.full((1, count), config.image_token_id)
    if good:
      places = vision_positions(tokens, tokens > 0, grid, config)
      assert places.max(axis=(0, 1)).tolist() == [0, 9, 9]
    else:
      with pytest.raises(UserError, match='121 image or video ids for 100 features'):
        vision_positions(tokens, tokens > 0, grid, config)


@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 2, 4)])
def test_the_mesh_changes_nothing(sizes):
  """Parameters and rows spread over eight devices: the same logits, from pixels on."""
  model, params = tiny_vl.model()
  data = tiny_vl.batch([[2, image(1, 4, 4), 3], [4], [image(1, 2, 6), 2], [1, image(1, 2, 2)]] * 2)
  expected = tiny_vl.logits(model, params, data)
  mesh = sharding.make_mesh(*sizes)
  spread = jax.device_put(params, sharding.param_shardings(params, mesh))
  inputs = data.tokens, data.valid, tiny_vl.positions(model, data), data.images
  inputs = jax.device_put(inputs, sharding.rows(mesh))

  def compute(params, tokens, valid, places, images):
    features = model.see(params, images)
    return model.forward(params, tokens, valid, places, features=features)[0] @ model.head(params).T

  with jax.set_mesh(mesh):
    got = jax.jit(compute)(spread, *inputs)
  close(np.asarray(got)[data.valid], np.asarray(expected)[data.valid], 1e-4)


def test_every_parameter_of_the_tower_has_one_rule_and_every_rule_one():
  names = set()
  for config in (tiny_vl.config(), PRESETS['qwen3-vl-8b']):
    tree = jax.eval_shape(build(config).init, jax.random.key(0))['vision']
    for path, leaf in jax.tree_util.tree_leaves_with_path({'vision': tree}):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      assert len(sharding.spec(name)) == len(leaf.shape)
      names.add(name)
  tops = {name.split('/')[1] for name in names}
  assert {'merger', 'deepstack_mergers', 'blocks'} < tops
  rules = [rule for pattern, rule in sharding.RULES if pattern.startswith('vision/')]
  assert len(rules) > 10
  assert all(any(sharding.spec(name) is rule for name in names) for rule in rules)


# Positions.


def test_v1_each_image_has_three_axes():
  config = tiny_vl.config()
  four = [IMAGE] * 4
  tokens = np.array([[7, 8, START, *four, END, START, *four, END]])
  places = vision_positions(tokens, tokens > 0, np.array([[[1, 4, 4]] * 2]), config)[0]
  assert places[:3].tolist() == [[0] * 3, [1] * 3, [2] * 3]
  assert places[3:7].tolist() == [[3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4]]
  assert places[7:9].tolist() == [[5] * 3, [6] * 3]
  assert places[9:13].tolist() == [[7, 7, 7], [7, 7, 8], [7, 8, 7], [7, 8, 8]]
  assert places[13].tolist() == [9] * 3


@pytest.mark.parametrize('side', ['left', 'right'])
def test_positions_are_those_of_transformers(pair, side):
  """Images and videos of every shape, in rows of every length, some without any."""
  peer, model, _ = pair
  rng = np.random.default_rng(0)

  def row():
    parts = []
    for _ in range(rng.integers(0, 4)):
      t, h, w = rng.integers(1, 4), 2 * rng.integers(1, 5), 2 * rng.integers(1, 5)
      parts += [int(rng.integers(1, 5))]
      parts += [video(int(t), int(h), int(w)) if rng.random() < 0.4 else image(1, int(h), int(w))]
    return [*parts, int(rng.integers(1, 9))]

  data = tiny_vl.batch([row() for _ in range(30)], side)
  inputs = tiny_vl.torch_inputs(data)
  names = ('input_ids', 'mm_token_type_ids', 'image_grid_thw', 'video_grid_thw', 'attention_mask')
  theirs, delta = peer.model.get_rope_index(**{name: inputs[name] for name in names})
  ours = tiny_vl.positions(model, data)
  assert ours.dtype == np.int32
  np.testing.assert_array_equal(ours[data.valid], theirs.permute(1, 2, 0).numpy()[data.valid])
  assert not ours[~data.valid].any()
  # What decoding goes on with.
  following = data.valid.sum(axis=1) + delta.numpy()[:, 0]
  np.testing.assert_array_equal(ours.max(axis=(1, 2)) + 1, following)


def test_images_without_text_between_them():
  tokens = np.array([[5, IMAGE, IMAGE, IMAGE, 6]])
  grid = np.array([[[1, 2, 4], [1, 2, 2]]])
  places = vision_positions(tokens, tokens > 0, grid, tiny_vl.config())[0]
  assert places.tolist() == [[0] * 3, [1, 1, 1], [1, 1, 2], [3, 3, 3], [4] * 3]


def test_rows_of_text_count_on():
  tokens, valid = tiny.batch([5, 3], 6, 'left')
  for config in (tiny_vl.config(), tiny.config()):
    places = vision_positions(tokens, valid, np.zeros((2, 1, 3), int), config)
    count = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    np.testing.assert_array_equal(places, np.repeat(count[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
  'ids, grid, words',
  [
    (
      [1, IMAGE, IMAGE],
      [[1, 3, 4]],
      'Row 0 has an image of 1 x 3 x 4 patches.*multiples of 2.*8 p',
    ),
    ([1, IMAGE, IMAGE], [[1, 0, 4]], 'must be positive multiples of 2'),
    (
      [1, IMAGE, IMAGE],
      [[1, 4, 4]],
      'Row 0 has 2 image or video ids for 4 features.*cut no prompt',
    ),
    ([1, IMAGE, IMAGE], [[0, 0, 0]], '2 image or video ids for 0 features'),
    ([1, 2, 3], [[1, 2, 2]], '0 image or video ids for 1 features'),
    ([IMAGE, 1, IMAGE], [[1, 2, 4]], '2 features of one image or frame.*side by side'),
    ([VIDEO, IMAGE, IMAGE, 1], [[1, 2, 4], [1, 2, 2]], 'order of its placeholders'),
  ],
)
def test_rows_that_do_not_fit_their_grids(ids, grid, words):
  tokens = np.array([ids])
  with pytest.raises(UserError, match=words):
    vision_positions(tokens, tokens > 0, np.array([grid]), tiny_vl.config())


def test_images_for_a_model_of_text_alone():
  tokens = np.array([[1, 2]])
  with pytest.raises(UserError, match=r'reads text alone.*use a Qwen3-VL model'):
    vision_positions(tokens, tokens > 0, np.array([[[1, 2, 2]]]), tiny.config())
