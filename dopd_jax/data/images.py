"""Reading images, whatever they come as: decoded once, to RGB as people see it."""

import base64
import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dopd_jax.errors import UserError, first_line

Size = tuple[int, int]  # width, height; pixels
# More than any camera's picture, less than where Pillow warns of a bomb.
PIXEL_LIMIT = 80_000_000
SIDE_RATIO_LIMIT = 200  # of the longer side to the shorter; that of the processor
# No formats that other programs draw (EPS), and none that hold anything but pictures.
_FORMATS = ('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM', 'JPEG2000', 'AVIF')
_ORIENTATION = 0x0112
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def as_sources(value: Any, where: str) -> tuple[Any, ...]:
  """The images of a column: one source, or a list of them, as a tuple of sources.

  A source is a path, a data URI in base64, bytes of an image file, a mapping with `bytes` or
  `path` (as Hugging Face datasets keep images), a PIL image, or an array of pixels, [h, w],
  [h, w, 1], [h, w, 3] or [h, w, 4] of uint8 or uint16.

  Raises:
    UserError: something else.
  """
  if isinstance(value, np.ndarray) and value.ndim == 4:
    value = list(value)
  sources = tuple(value) if isinstance(value, list | tuple) else (value,)
  for source in sources:
    kinds = str | os.PathLike | bytes | Mapping | Image.Image | np.ndarray
    if not isinstance(source, kinds):
      raise UserError(
        f'{where} holds a {type(source).__name__}; an image is a path, bytes, or a base64 data URI.'
      )
  return sources


def inside(source: Any, folders: Sequence[str], where: str) -> Any:
  """An image's source, checked: a path that leads into one of the folders, links resolved.

  A relative path starts in the first of the folders where it exists, or else where the command
  runs. What is no path comes back as it is.

  Raises:
    UserError: the path leads elsewhere, so that whoever wrote the data could have any picture of
      this machine read.
  """
  if isinstance(source, Mapping) and source.get('bytes') is None:
    return {**source, 'path': inside(source.get('path'), folders, where)}
  if not isinstance(source, str | os.PathLike) or _is_data(source) or _is_remote(source):
    return source
  given = os.fspath(source)
  found = [*(os.path.join(folder, given) for folder in folders), given]
  path = next((path for path in found if os.path.exists(path)), found[0])
  try:
    real = os.path.realpath(path)
    roots = [os.path.realpath(folder) for folder in folders]
  except (OSError, ValueError):
    return source  # no path of this machine: reading it says so
  if any(os.path.commonpath([root, real]) == root for root in roots):
    return path
  raise UserError(
    f'{where}: the image {given[:120]!r} lies outside the folder of the data; move it there, or '
    'name its folder in image_folder.'
  )


def _is_data(source: Any) -> bool:
  return isinstance(source, str) and source[:5].lower() == 'data:'


def _is_remote(source: Any) -> bool:
  return '://' in os.fspath(source)[:20]


def read_image(
  source: Any, where: str = 'the image', pixel_limit: int = PIXEL_LIMIT
) -> Image.Image:
  """Decodes an image to RGB as people see it.

  The orientation of its EXIF data is applied; grey, palette and CMYK images are converted, what is
  transparent is laid over white; integers of more than 8 bits are taken as 16 and scaled to 8; of
  several frames the first one counts.

  Args:
    source: see `as_sources`.
    where: the record, for errors.
    pixel_limit: most pixels.

  Returns:
    A new image of mode RGB.

  Raises:
    UserError: there is no such file, it is empty, cut short, broken or of an unknown format, a
      remote address, without pixels, over `pixel_limit`, or over 200 times as long as wide.
  """
  with _opened(source, where, pixel_limit) as image:
    image.load()
    turn = _turn(image)
    image = _rgb(image, where)
    return image if turn is None else image.transpose(turn)


def image_size(source: Any, where: str = 'the image', pixel_limit: int = PIXEL_LIMIT) -> Size:
  """(width, height) of what `read_image` returns, from the head of the file where that tells it.

  Raises:
    UserError: as `read_image`, except for damage behind the head.
  """
  with _opened(source, where, pixel_limit) as image:
    width, height = image.size
    if image.format == 'PNG':
      image.load()  # its orientation may stand behind the pixels
    # Pillow has turned the size of a TIFF by itself.
    turn = None if image.format == 'TIFF' else _turn(image)
    sideways = turn is not None and turn not in (_TURNS[2], _TURNS[3], _TURNS[4])
    return (height, width) if sideways else (width, height)


def image_digest(source: Any, where: str = 'the image') -> str:
  """A hash of an image's bytes: of the file's, or of the pixels where it is given as those."""
  if isinstance(source, Image.Image | np.ndarray):
    pixels = np.asarray(source)
    head = f'{pixels.shape} {pixels.dtype}'.encode()
    return hashlib.sha256(head + pixels.tobytes()).hexdigest()
  with contextlib.closing(_file(source, where)) as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def _opened(source: Any, where: str, pixel_limit: int) -> Iterator[Image.Image]:
  """An image before its pixels are read; whatever goes wrong inside is a UserError."""
  with contextlib.ExitStack() as stack:
    try:
      if isinstance(source, Image.Image):
        image = source
      elif isinstance(source, np.ndarray):
        image = _from_array(source, where)
      else:
        file = stack.enter_context(_file(source, where))
        image = stack.enter_context(Image.open(file, formats=_known_formats()))
      check_size(image.size, where, pixel_limit)
      yield image
    except UserError:
      raise
    except Exception as error:  # the decoders of the formats raise whatever they like
      if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        raise UserError(
          f'{where}: the image{_name(source)} has far over {pixel_limit} pixels; make it smaller.'
        ) from None
      unknown = isinstance(error, UnidentifiedImageError)  # which names objects in memory
      reason = '' if unknown else f' ({first_line(error)})'
      raise UserError(
        f'{where}: the image{_name(source)} is broken, cut short or of an unknown format{reason}; '
        'repair it or remove the record.'
      ) from None


@functools.cache
def _known_formats() -> tuple[str, ...]:
  """Those of `_FORMATS` that this Pillow was built with."""
  Image.init()
  return tuple(name for name in _FORMATS if name in Image.OPEN)


def _file(source: Any, where: str) -> io.BytesIO | io.BufferedReader:
  """The bytes of an image as a file open for reading."""
  if isinstance(source, Mapping):
    keys = [key for key in ('bytes', 'path') if source.get(key) is not None]
    if not keys:
      raise UserError(f'{where}: the image has neither bytes nor a path; give one of them.')
    return _file(source[keys[0]], where)
  if _is_data(source):
    head, comma, body = source.partition(',')
    if not comma or not head.lower().endswith(';base64'):
      raise UserError(
        f"{where}: the image's data URI is not base64: write data:image/png;base64,..."
      )
    try:
      source = base64.b64decode(''.join(body.split()), validate=True)
    except ValueError as error:
      raise UserError(
        f"{where}: the image's data URI is broken ({error}); encode the file again."
      ) from None
  if isinstance(source, bytes):
    if not source:
      raise UserError(f'{where}: the image is empty, 0 bytes; repair it or remove the record.')
    return io.BytesIO(source)
  path = os.fspath(source)
  if _is_remote(path):
    raise UserError(
      f'{where}: the image {path[:80]!r} is a remote address; download it first and give its path.'
    )
  try:
    if os.path.getsize(path):
      return open(path, 'rb')
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or first_line(error)
    raise UserError(
      f'{where}: the image{_name(source)} cannot be opened ({reason}); name a file, with a '
      'relative path from the folder of the data or from where the command runs.'
    ) from None
  raise UserError(
    f'{where}: the image{_name(source)} is empty, 0 bytes; repair it or remove the record.'
  )


def _from_array(pixels: np.ndarray, where: str) -> Image.Image:
  shape = pixels.shape[:2] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels.shape
  good = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
  if not good or pixels.dtype not in (np.uint8, np.uint16):
    raise UserError(
      f'{where}: an image given as pixels is [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] of uint8 or '
      f'uint16, not {list(pixels.shape)} of {pixels.dtype}.'
    )
  check_size(shape[1::-1], where, None)
  if pixels.dtype == np.uint16:
    pixels = _eight_bits(pixels)
  return Image.fromarray(np.ascontiguousarray(pixels.reshape(shape)))


def _rgb(image: Image.Image, where: str) -> Image.Image:
  if image.mode == 'F':
    raise UserError(
      f'{where}: the pixels of the image are floating-point numbers of unknown range; save it with '
      '8 bits a channel.'
    )
  if image.mode.startswith('I'):
    return Image.fromarray(_eight_bits(np.asarray(image))).convert('RGB')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
  wide = np.clip(pixels.astype(np.int64), 0, 65535)
  return ((wide * 255 + 32767) // 65535).astype(np.uint8)


def _turn(image: Image.Image) -> Image.Transpose | None:
  try:
    return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
  except Exception:  # damaged EXIF data say nothing; the picture itself may be fine
    return None


def check_size(size: Size, where: str, pixel_limit: int | None) -> None:
  """Raises `UserError` for an image without pixels, over a limit, or far longer than wide."""
  width, height = size
  if min(size) < 1:
    raise UserError(f'{where}: the image has no pixels, {width} x {height}; remove the record.')
  if max(size) > SIDE_RATIO_LIMIT * min(size):
    raise UserError(
      f'{where}: the image of {width} x {height} pixels is over {SIDE_RATIO_LIMIT} times as long '
      'as wide; crop it or remove the record.'
    )
  if pixel_limit is not None and width * height > pixel_limit:
    raise UserError(
      f'{where}: the image of {width} x {height} pixels is over the limit of {pixel_limit}; '
      'make it smaller.'
    )


def _name(source: Any) -> str:
  """' file.png' for a path, '' for anything that has no name."""
  if isinstance(source, Mapping):
    source = source.get('path') if source.get('bytes') is None else None
  named = isinstance(source, str | os.PathLike) and not str(source).startswith('data:')
  return f' {str(source)[:120]!r}' if named else ''
