"""What is known of a record's images before any step: sizes, patches, identity, contexts.

Everything here is found once, when the data are opened, and every mistake in an image or a box is
told then, with the record.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dopd_jax.data.boxes import check_inside, privileged_text
from dopd_jax.data.image_processor import Grid, ImageProcessor
from dopd_jax.data.images import PIXEL_LIMIT, Size, image_digest, image_size, read_image
from dopd_jax.data.records import Record
from dopd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageInputs:
  """What a run that reads images needs for its prompts.

  Attributes:
    processor: of the model.
    image_token_id: the token that stands for one merged patch, `<|image_pad|>`.
    check_pixels: decode every image when the data are opened, so that a broken one is found before
      the first step, and know it by a hash of its bytes. If not, only the head of a file is read,
      and its name and size in bytes are its identity.
    pixel_limit: most pixels of an image.
  """

  processor: ImageProcessor
  image_token_id: int
  check_pixels: bool = True
  pixel_limit: int = PIXEL_LIMIT


class Pictures(NamedTuple):
  """Of the images of one record: (width, height) of each, (t, h, w) of each, and their identity."""

  sizes: tuple[Size, ...] = ()
  grids: tuple[Grid, ...] = ()
  digest: str = ''


def image_place(record: Record, index: int) -> str:
  """How errors name an image: 'Record a1', with its number where there are several."""
  several = len(record.images) > 1
  return f'Record {record.id}, image {index + 1}' if several else f'Record {record.id}'


def image_grids(record: Record, inputs: ImageInputs) -> tuple[Grid, ...]:
  """The grids of a record's images, from their sizes; raises `UserError` as `image_size`."""
  sizes = [
    image_size(source, image_place(record, i), inputs.pixel_limit)
    for i, source in enumerate(record.images)
  ]
  return tuple(inputs.processor.grid(size) for size in sizes)


def examine_all(
  records: Sequence[Record], inputs: ImageInputs | None, max_prompt_tokens: int
) -> Iterator[Pictures]:
  """The `Pictures` of each record, several at a time, in order.

  Raises:
    UserError: images in a run that reads none, an image that `read_image` refuses or that alone is
      longer than a prompt may be, or boxes that do not fit their image.
  """
  if not any(record.images for record in records):
    yield from (Pictures() for _ in records)
    return

  def examine(record: Record) -> Pictures:
    return _examine(record, inputs, max_prompt_tokens)

  # Decoding releases the interpreter lock.
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    yield from pool.map(examine, records)


def with_context(record: Record, kind: str, sizes: Sequence[Size] = ()) -> Record:
  """The record with the privileged context of a kind: 'column' leaves it as it is.

  Args:
    record: with the columns that the kind takes.
    kind: 'column' or a key of `boxes.KINDS`.
    sizes: of its images.

  Raises:
    UserError: a column that the kind takes is missing.
  """
  if kind == 'column':
    return record
  text = privileged_text(
    kind,
    record.boxes,
    record.labels,
    record.caption,
    record.answer,
    sizes[0] if sizes else None,
    record.box_format or 'absolute',
    f'Record {record.id}',
  )
  return dataclasses.replace(record, privileged_context=text)


def _examine(record: Record, inputs: ImageInputs | None, max_prompt_tokens: int) -> Pictures:
  if not record.images:
    return Pictures()
  if inputs is None:
    raise images_unread(record)
  sizes, grids, digest = [], [], hashlib.sha256()
  for i, source in enumerate(record.images):
    where = image_place(record, i)
    if inputs.check_pixels:
      size = read_image(source, where, inputs.pixel_limit).size
      digest.update(image_digest(source, where).encode())
    else:
      size = image_size(source, where, inputs.pixel_limit)
      digest.update(_file_identity(source, where).encode())
    grid = inputs.processor.grid(size)
    tokens = inputs.processor.tokens(grid)
    if tokens > max_prompt_tokens:
      raise UserError(
        f'{where}: the image of {size[0]} x {size[1]} pixels alone has {tokens} tokens and '
        f'data.max_prompt_tokens is {max_prompt_tokens}; raise it, or lower max_pixels of the '
        'image processor.'
      )
    sizes.append(size)
    grids.append(grid)
  if record.boxes:
    where = f'Record {record.id}'
    if len(sizes) > 1:
      raise UserError(
        f'{where}: boxes belong to one image and the record has {len(sizes)}; keep one of them.'
      )
    check_inside(record.boxes, record.box_format or 'absolute', sizes[0], where)
  return Pictures(tuple(sizes), tuple(grids), digest.hexdigest())


def images_unread(record: Record) -> UserError:
  """The error of a record with images in a run without a vision model."""
  return UserError(
    f'Record {record.id} has images and this run reads text only; choose a model that reads '
    'images, such as Qwen3-VL, or take the column of images out of the data.'
  )


def _file_identity(source: Any, where: str) -> str:
  path = source.get('path') if isinstance(source, dict) and not source.get('bytes') else source
  if isinstance(path, str | os.PathLike) and not str(path).startswith('data:'):
    return f'{os.path.basename(path)} {os.path.getsize(path)}'
  return image_digest(source, where)
