"""What a policy sees of a record's image: all of it, its evidence, or too little; and padding.

full      the image
crop      the part around the record's boxes, enlarged to what the model reads (Vision-OPD)
boxed     the image with the boxes drawn into it (a variant of Vision-OPD, and for people)
degraded  the image down to 10 % and back (VA-OPD)

A crop has another size, so another number of tokens: prompts for it are rendered with its grids,
`renderer.plain_batch(records, grids=[view_grids(e, processor, 'crop') for e in examples])`.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dopd_jax.data.boxes import Box, to_pixels
from dopd_jax.data.image_inputs import image_place
from dopd_jax.data.image_processor import Grid, ImageProcessor
from dopd_jax.data.images import SIDE_RATIO_LIMIT, Size, read_image
from dopd_jax.data.pipeline import Example
from dopd_jax.errors import UserError

VIEWS = ('full', 'crop', 'boxed', 'degraded')
Region = tuple[int, int, int, int]  # x1, y1, x2, y2; pixels


def degraded(image: Image.Image, factor: float = 0.1) -> Image.Image:
  """The image without its details: both sides times `factor` by bilinear interpolation (Pillow's,
  which averages over what it leaves out), and back to its size by the nearest neighbour."""
  size = [max(1, round(side * factor)) for side in image.size]
  small = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
  return small.resize(image.size, Image.Resampling.NEAREST)


def crop_region(size: Size, boxes: Sequence[Box], margin: float, least: int) -> Region:
  """The pixels that a crop keeps: the union of the boxes and a margin around it.

  Args:
    size: (width, height) of the image.
    boxes: in pixels, at least one.
    margin: added on each side, as a share of the union's width and height.
    least: smallest width and height, as far as the image has them. A side is also kept from being
      over 200 times as long as the other.
  """
  x1, y1 = (min(box[i] for box in boxes) for i in (0, 1))
  x2, y2 = (max(box[i] for box in boxes) for i in (2, 3))
  wide, high = margin * (x2 - x1), margin * (y2 - y1)
  spans = [(x1 - wide, x2 + wide), (y1 - high, y2 + high)]
  longest = max(min(stop, side) - max(start, 0) for (start, stop), side in zip(spans, size))
  least = max(least, math.ceil((longest + 2) / SIDE_RATIO_LIMIT))
  (x1, x2), (y1, y2) = (_span(*span, least, side) for span, side in zip(spans, size))
  return x1, y1, x2, y2


def crop(
  image: Image.Image, boxes: Sequence[Box], margin: float = 0.1, least: int = 1
) -> Image.Image:
  """The part of an image around its boxes; `crop_region` says which."""
  return image.crop(crop_region(image.size, boxes, margin, least))


def draw_boxes(
  image: Image.Image,
  boxes: Sequence[Box],
  labels: Sequence[str] = (),
  colour: str = 'red',
) -> Image.Image:
  """A copy of an image with boxes, in pixels, drawn into it, and a label at the head of each."""
  image = image.copy()
  draw = ImageDraw.Draw(image)
  line = max(1, round(max(image.size) / 250))
  font = ImageFont.load_default(max(8, round(max(image.size) / 40))) if labels else None
  for i, (x1, y1, x2, y2) in enumerate(boxes):
    # The last pixel of a box lies before its edge; a line has its own width within.
    draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
    if i < len(labels) and font is not None:
      left, top, right, bottom = draw.textbbox((0, 0), labels[i], font=font)
      y = max(0.0, y1 - (bottom - top) - 2)
      draw.rectangle((x1, y, x1 + right - left + 2, y + bottom - top + 2), fill=colour)
      draw.text((x1 + 1 - left, y + 1 - top), labels[i], fill='white', font=font)
  return image


def view_grids(
  example: Example, processor: ImageProcessor, view: str = 'full', margin: float = 0.1
) -> tuple[Grid, ...]:
  """(t, h, w) of each image of an example in a view, without reading any.

  Raises:
    UserError: no such view, or one of boxes and the record has none.
  """
  _check_view(example, view)
  if view != 'crop':
    return tuple(processor.grid(size) for size in example.sizes)
  return tuple(
    processor.grid((x2 - x1, y2 - y1))
    for x1, y1, x2, y2 in (
      crop_region(size, _boxes(example, size), margin, processor.factor) for size in example.sizes
    )
  )


def example_images(
  example: Example,
  processor: ImageProcessor,
  view: str = 'full',
  *,
  margin: float = 0.1,
  factor: float = 0.1,
) -> tuple[list[np.ndarray], list[Grid]]:
  """Decodes an example's images in a view: the patches [n, C] float32 of each, and their grids.

  Args:
    example: with images, or without any: ([], []).
    processor: of the model.
    view: of `VIEWS`.
    margin: of a crop, as a share of the boxes' width and height.
    factor: of a degraded image.

  Raises:
    UserError: as `view_grids` and `read_image`; or a file has changed since the data were opened.
  """
  grids = view_grids(example, processor, view, margin)
  patches = []
  for i, (source, size) in enumerate(zip(example.images, example.sizes, strict=True)):
    where = image_place(example.record, i)
    image = read_image(source, where)
    if image.size != size:
      raise UserError(
        f'{where}: the image had {size[0]} x {size[1]} pixels when the data were opened and now '
        f'has {image.size[0]} x {image.size[1]}; keep the files as they are during a run.'
      )
    if view == 'crop':
      image = crop(image, _boxes(example, size), margin, processor.factor)
    elif view == 'boxed':
      image = draw_boxes(image, _boxes(example, size))
    elif view == 'degraded':
      image = degraded(image, factor)
    patches.append(processor.patches(image))
  return patches, list(grids)


def image_buckets(
  rows: Sequence[Sequence[Grid]], bucket: int, least_images: int = 0
) -> tuple[int, int]:
  """(I, P) for `pad_images`, coarse enough that new sizes seldom mean a new compilation.

  Args:
    rows: the grids of each row's images.
    bucket: patches; a multiple of the processor's merge_size ** 2.
    least_images: of I, where a run should have images in every batch.

  Returns:
    I, the most images of a row, and P, the most patches of an image: I up to the next power of two,
    P to the next multiple of `bucket`. (0, 0) without images.
  """
  most = max([least_images, *map(len, rows)])
  if not most:
    return 0, 0
  longest = max([1, *(math.prod(grid) for grids in rows for grid in grids)])
  return 1 << (most - 1).bit_length(), -(-longest // bucket) * bucket


def pad_images(
  rows: Sequence[tuple[Sequence[np.ndarray], Sequence[Grid]]],
  I: int,
  P: int,
  channels: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads the images of a batch to one shape.

  Args:
    rows: b rows of (patches [n, C] of each image, their grids); one prompt's samples each need
      a row of their own, or are repeated afterwards.
    I: images a row, `image_buckets`.
    P: patches an image.
    channels: C, where no row may have an image.

  Returns:
    patches [b, I, P, C] float32, zero behind an image and where there is none, and grid [b, I, 3]
    int32, all zero where there is none.

  Raises:
    ValueError: a row has more images, an image more patches, or patches do not match their grid.
  """
  C = next((each.shape[1] for patches, _ in rows for each in patches), channels)
  if C is None:
    raise ValueError('no row has an image: name the channels')
  padded = np.zeros((len(rows), I, P, C), np.float32)
  grid = np.zeros((len(rows), I, 3), np.int32)
  for row, (patches, grids) in enumerate(rows):
    if len(patches) > I or len(patches) != len(grids):
      raise ValueError(f'row {row} has {len(patches)} images and {len(grids)} grids for {I} places')
    for i, (each, shape) in enumerate(zip(patches, grids)):
      if len(each) > P or len(each) != math.prod(shape):
        raise ValueError(f'image {i} of row {row}: {len(each)} patches, grid {shape}, {P} places')
      padded[row, i, : len(each)] = each
      grid[row, i] = shape
  return padded, grid


def _span(start: float, stop: float, least: int, side: int) -> tuple[int, int]:
  """Whole pixels over start..stop, at least `least`, within 0..side."""
  first, last = max(0, math.floor(start)), min(side, math.ceil(stop))
  missing = min(least, side) - (last - first)
  if missing > 0:
    first -= missing // 2
    last += missing - missing // 2
    shift = max(0, -first) - max(0, last - side)
    first, last = first + shift, last + shift
  return first, last


def _boxes(example: Example, size: Size) -> list[Box]:
  record = example.record
  return to_pixels(record.boxes or (), record.box_format or 'absolute', size)


def _check_view(example: Example, view: str) -> None:
  if view not in VIEWS:
    raise UserError(f'There is no view {view!r} of an image: choose one of {", ".join(VIEWS)}.')
  if view in ('crop', 'boxed') and example.images and not example.record.boxes:
    raise UserError(
      f'Record {example.record.id} has no boxes, and the view {view} is made of them; add the '
      'column boxes.'
    )
