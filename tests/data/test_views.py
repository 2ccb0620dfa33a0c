"""What a policy sees of an image, and batches of it with one shape."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dopd_jax.data import (
  Record,
  crop,
  degraded,
  draw_boxes,
  example_images,
  image_buckets,
  pad_images,
  tokenise,
  view_grids,
)
from dopd_jax.data.views import VIEWS, crop_region
from dopd_jax.errors import UserError
from tests.data.pictures import PROCESSOR, encoded, picture, png, renderer

RENDERER = renderer()
PAD = RENDERER.images.image_token_id


def example(images, boxes=None, box_format='absolute', prompt='what is this'):
  record = Record('r1', prompt, images=tuple(images), boxes=boxes, box_format=box_format)
  return tokenise([record], RENDERER, max_prompt_tokens=2000).examples[0]


def test_degraded_is_bilinear_down_and_nearest_up():
  image = picture(40, 20)
  low = degraded(image)
  assert low.size == (40, 20)
  blocks = np.asarray(low).reshape(2, 10, 4, 10, 3)
  assert (blocks == blocks[:, :1, :, :1]).all()  # 4 x 2 blocks of one colour
  small = image.resize((4, 2), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(blocks[:, 0, :, 0], np.asarray(small))
  np.testing.assert_array_equal(np.asarray(degraded(image, 1.0)), np.asarray(image))
  assert degraded(picture(3, 1)).size == (3, 1)  # never without pixels
  assert (np.asarray(degraded(Image.new('RGB', (9, 9), (4, 5, 6)))) == (4, 5, 6)).all()


def test_crop_is_the_union_with_its_margin():
  image = picture(100, 80)
  boxes = [(20, 10, 30, 20), (40, 30, 60, 50)]
  region = crop_region((100, 80), boxes, 0.1, 1)
  assert region == (16, 6, 64, 54)  # 40 x 40 and a tenth of it on each side
  np.testing.assert_array_equal(np.asarray(crop(image, boxes)), np.asarray(image)[6:54, 16:64])
  assert crop_region((100, 80), boxes, 0.0, 1) == (20, 10, 60, 50)
  assert crop_region((100, 80), [(0, 0, 100, 80)], 0.5, 1) == (0, 0, 100, 80)
  assert crop_region((100, 80), [(90.2, 70.7, 100, 80)], 0.0, 1) == (90, 70, 100, 80)
  # At least so large, moved back where it would leave the image.
  assert crop_region((100, 80), [(50, 40, 51, 41)], 0.0, 8) == (47, 37, 55, 45)
  assert crop_region((100, 80), [(99, 0, 100, 1)], 0.0, 8) == (92, 0, 100, 8)
  assert crop_region((5, 80), [(1, 10, 2, 11)], 0.0, 8) == (0, 7, 5, 15)
  # A line of print across a page: high enough for its width.
  x1, y1, x2, y2 = crop_region((3000, 3000), [(0, 10, 3000, 10.5)], 0.0, 8)
  assert (x1, x2) == (0, 3000) and y1 <= 10 and y2 >= 11 and 15 <= y2 - y1 <= 17


sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000)).filter(
  lambda s: max(s) <= 200 * min(s)
)


@given(sizes, st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=3), st.floats(0, 2))
@settings(max_examples=300, deadline=None)
def test_a_crop_is_always_an_image_that_the_processor_takes(size, fractions, margin):
  boxes = [
    (min(a, c) * size[0], min(b, d) * size[1], max(a, c) * size[0], max(b, d) * size[1])
    for a, b, c, d in fractions
  ]
  x1, y1, x2, y2 = crop_region(size, boxes, margin, PROCESSOR.factor)
  assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
  assert x2 - x1 >= min(8, size[0]) and y2 - y1 >= min(8, size[1])
  assert x1 <= min(b[0] for b in boxes) and x2 >= max(b[2] for b in boxes)
  assert y1 <= min(b[1] for b in boxes) and y2 >= max(b[3] for b in boxes)
  PROCESSOR.grid((x2 - x1, y2 - y1))


def test_boxes_are_drawn_on_a_copy():
  image = Image.new('RGB', (60, 40), 'white')
  drawn = draw_boxes(image, [(10, 20, 30, 35)], ['dog'])
  assert (np.asarray(image) == 255).all()
  pixels = np.asarray(drawn).astype(int)
  red = (pixels == (255, 0, 0)).all(-1)
  assert (
    red[20, 10:30].all() and red[34, 10:30].all() and red[20:35, 10].all() and red[20:35, 29].all()
  )
  assert not red[25:30, 15:25].any()  # an outline, not a block
  assert (
    red[:20].any() and not (np.asarray(draw_boxes(image, [(10, 20, 30, 35)]))[:20] != 255).any()
  )
  draw_boxes(image, [(0, 0, 0.2, 0.2), (0, 0, 60, 40)], ['ü球', ''], colour='blue')


def test_every_view_has_the_patches_of_its_picture():
  image = picture(40, 24)
  boxes = ((8.0, 8.0, 24.0, 16.0),)
  ex = example([encoded(image)], boxes)
  wanted = {
    'full': image,
    'crop': crop(image, boxes, 0.1, 8),
    'boxed': draw_boxes(image, boxes),
    'degraded': degraded(image),
  }
  assert set(wanted) == set(VIEWS)
  for view, picture_of_view in wanted.items():
    patches, grids = example_images(ex, PROCESSOR, view)
    np.testing.assert_array_equal(patches[0], PROCESSOR.patches(picture_of_view))
    assert grids == [PROCESSOR.grid(picture_of_view.size)]
    assert tuple(grids) == view_grids(ex, PROCESSOR, view)
  assert view_grids(ex, PROCESSOR, 'crop') != ex.grids == view_grids(ex, PROCESSOR)
  assert example([]).grids == ()
  assert example_images(example([]), PROCESSOR, 'crop') == ([], [])


def test_boxes_of_a_thousand_crop_as_those_in_pixels():
  image = png(50, 20)
  absolute = example([image], ((10.0, 5.0, 20.0, 15.0),))
  thousand = example([image], ((200.0, 250.0, 400.0, 750.0),), 'thousand')
  for view in ('crop', 'boxed'):
    one, two = (example_images(e, PROCESSOR, view)[0][0] for e in (absolute, thousand))
    np.testing.assert_array_equal(one, two)


def test_views_that_cannot_be():
  with pytest.raises(UserError, match="no view 'zoomed'"):
    view_grids(example([png()]), PROCESSOR, 'zoomed')
  for view in ('crop', 'boxed'):
    with pytest.raises(UserError, match='Record r1 has no boxes'):
      example_images(example([png()]), PROCESSOR, view)


def test_a_file_that_changed_is_noticed(tmp_path):
  path = tmp_path / 'a.png'
  path.write_bytes(png(16, 16))
  ex = example([str(path)])
  path.write_bytes(png(24, 16))
  with pytest.raises(UserError, match=r'Record r1: .*16 x 16.*24 x 16'):
    example_images(ex, PROCESSOR)
  path.unlink()
  with pytest.raises(UserError, match=r'Record r1: .*cannot be opened'):
    example_images(ex, PROCESSOR)


@given(
  st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), max_size=3),
  st.sampled_from(VIEWS),
  st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_placeholders_are_features_in_every_view(sizes, view, with_box):
  images = [png(*size) for size in sizes]
  boxes = ((0.0, 0.0, 1.0, 1.0),) if with_box and len(images) == 1 else None
  if view in ('crop', 'boxed') and images and not boxes:
    return
  ex = example(images, boxes)
  patches, grids = example_images(ex, PROCESSOR, view)
  prompts = RENDERER.plain_batch([ex.record], grids=[view_grids(ex, PROCESSOR, view)])
  prompts += RENDERER.privileged_batch(
    [dataclasses.replace(ex.record, privileged_context='dog')], grids=[grids]
  )
  for ids in prompts:
    assert ids.count(PAD) == sum(len(p) for p in patches) // PROCESSOR.merge_size**2
  if view != 'crop':
    assert ex.prompt_ids == prompts[0] == RENDERER.plain(ex.record)


# Padding


def test_buckets():
  assert image_buckets([[], []], 64) == (0, 0)
  assert image_buckets([[]], 64, least_images=1) == (1, 64)
  assert image_buckets([[(1, 4, 4)], []], 64) == (1, 64)
  assert image_buckets([[(1, 8, 8)] * 3, [(1, 2, 40)]], 64) == (4, 128)
  assert image_buckets([[(1, 8, 8)] * 5], 16) == (8, 64)


def test_padding_keeps_every_image_in_its_place():
  rows = [
    example_images(example(images), PROCESSOR)
    for images in ([png(16, 16), png(40, 8, 1)], [], [png(8, 8, 2)])
  ]
  I, P = image_buckets([grids for _, grids in rows], 8)
  assert (I, P) == (2, 24)
  patches, grid = pad_images(rows, I, P)
  assert patches.shape == (3, 2, 24, PROCESSOR.channels) and patches.dtype == np.float32
  assert grid.shape == (3, 2, 3) and grid.dtype == np.int32
  assert grid.tolist() == [[[1, 4, 4], [1, 2, 10]], [[0, 0, 0]] * 2, [[1, 2, 2], [0, 0, 0]]]
  for row, (each, _) in enumerate(rows):
    for i in range(2):
      n = math.prod(grid[row, i])
      assert (patches[row, i, n:] == 0).all()
      if n:
        np.testing.assert_array_equal(patches[row, i, :n], each[i])


def test_samples_of_a_prompt_repeat_its_grids():
  row = example_images(example([png(16, 8)]), PROCESSOR)
  patches, grid = pad_images([row] * 3, 1, 64)
  assert grid.tolist() == [[[1, 2, 4]]] * 3
  assert (patches == patches[:1]).all() and patches[0].any()


def test_padding_never_cuts():
  row = example_images(example([png(16, 16)]), PROCESSOR)
  with pytest.raises(ValueError, match='0 places'):
    pad_images([row], 0, 64)
  with pytest.raises(ValueError, match='16 patches'):
    pad_images([row], 1, 15)
  with pytest.raises(ValueError, match='16 patches'):
    pad_images([(row[0], [(1, 4, 5)])], 1, 64)
  with pytest.raises(ValueError, match='channels'):
    pad_images([([], [])], 1, 64)
  patches, grid = pad_images([([], [])], 1, 64, channels=96)
  assert patches.shape == (1, 1, 64, 96) and not grid.any()
