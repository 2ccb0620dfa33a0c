"""Cutting images into patches: resized once, by the processor of a model.

How many patches an image gives is known from its size alone.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dopd_jax.data.images import Size, check_size
from dopd_jax.errors import UserError, first_line

Grid = tuple[int, int, int]  # patches in time (1), height and width


class ImageProcessor:
  """Resizes and normalises an image and cuts it into patches, as Qwen2-VL and Qwen3-VL do.

  The sides are rounded to multiples of `factor` = patch_size * merge_size, and the image is scaled
  (bicubic) so that its pixels lie between `min_pixels` and `max_pixels`. The patches of one merged
  token follow each other: the order is (h / merge, w / merge, merge, merge), row by row.

  Args:
    patch_size: side of a patch, pixels.
    merge_size: side of the square of patches that becomes one token.
    temporal_patch_size: how often a still image is repeated in a patch.
    min_pixels: least pixels after resizing, kept but for rounding.
    max_pixels: most pixels after resizing; a very long image may have more.
    mean: of the channels in 0 to 1, subtracted.
    std: of the channels, divided by.

  Raises:
    UserError: impossible numbers.
  """

  def __init__(
    self,
    patch_size: int = 16,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    min_pixels: int = 65_536,
    max_pixels: int = 16_777_216,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
  ):
    # Imported here: text-only runs do without, and it takes its time.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    self._use(
      Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=temporal_patch_size,
        size={'shortest_edge': min_pixels, 'longest_edge': max_pixels},
        image_mean=list(mean),
        image_std=list(std),
      )
    )

  @classmethod
  def from_directory(
    cls, directory: str, min_pixels: int | None = None, max_pixels: int | None = None
  ) -> 'ImageProcessor':
    """The processor of a model, from its preprocessor_config.json (or processor_config.json).

    Args:
      directory: of the model.
      min_pixels: instead of the model's own.
      max_pixels: instead of the model's own; fewer pixels make fewer tokens.

    Raises:
      UserError: the directory has no such file, or one of another family of models.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = ('processor_config.json', 'preprocessor_config.json')
    if not any(os.path.isfile(os.path.join(directory, name)) for name in names):
      raise UserError(
        f'{directory} has no preprocessor_config.json: name the directory of a model that reads '
        'images, such as Qwen3-VL.'
      )
    try:
      wrapped = Qwen2VLImageProcessorPil.from_pretrained(directory)
      size = dict(wrapped.size)
    except Exception as error:  # whatever transformers makes of odd values
      raise UserError(
        f'The image processor of {directory} cannot be read ({first_line(error)}): it must be '
        'that of Qwen2-VL or Qwen3-VL.'
      ) from None
    if not {'shortest_edge', 'longest_edge'} <= {k for k, v in size.items() if v}:
      raise UserError(
        f'The image processor of {directory} is of another family: its size is {size}, and '
        'shortest_edge and longest_edge in pixels are needed, as in Qwen3-VL.'
      )
    changed = {'shortest_edge': min_pixels, 'longest_edge': max_pixels}
    wrapped.size = {key: size[key] if value is None else value for key, value in changed.items()}
    processor = cls.__new__(cls)
    try:
      processor._use(wrapped)
    except (TypeError, AttributeError) as error:
      raise UserError(
        f'The image processor of {directory} holds a value of the wrong kind '
        f'({first_line(error)}): download it again.'
      ) from None
    return processor

  def save(self, directory: str) -> None:
    """Writes preprocessor_config.json into a directory, for `from_directory`."""
    self._wrapped.save_pretrained(directory)

  def __eq__(self, other: object) -> bool:
    """Whether both give the same patches of every image."""
    return isinstance(other, ImageProcessor) and self._facts == other._facts

  __hash__ = None  # type: ignore[assignment]

  @property
  def _facts(self) -> tuple[Any, ...]:
    w = self._wrapped
    size = w.size['shortest_edge'], w.size['longest_edge']
    sizes = w.patch_size, w.merge_size, w.temporal_patch_size, w.resample, w.rescale_factor
    return *size, *sizes, *w.image_mean, *w.image_std

  @property
  def patch_size(self) -> int:
    """Side of a patch, pixels."""
    return self._wrapped.patch_size

  @property
  def merge_size(self) -> int:
    """Side of the square of patches that becomes one token."""
    return self._wrapped.merge_size

  @property
  def factor(self) -> int:
    """Side of what becomes one token, pixels."""
    return self.patch_size * self.merge_size

  @property
  def channels(self) -> int:
    """C, the numbers in a patch: 3 * temporal_patch_size * patch_size ** 2."""
    return 3 * self._wrapped.temporal_patch_size * self.patch_size**2

  def grid(self, size: Size) -> Grid:
    """(1, h, w): the patches of an image of (width, height) pixels.

    Raises:
      UserError: a side is 0, or one is over 200 times as long as the other.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    check_size(size, 'the image', None)
    least, most = self._wrapped.size['shortest_edge'], self._wrapped.size['longest_edge']
    height, width = smart_resize(size[1], size[0], self.factor, least, most)
    return 1, height // self.patch_size, width // self.patch_size

  def tokens(self, grid: Sequence[int]) -> int:
    """Tokens that an image with this grid takes in a prompt: t h w / merge_size ** 2."""
    t, h, w = (int(n) for n in grid)
    return t * h * w // self.merge_size**2

  def patches(self, image: Image.Image) -> np.ndarray:
    """The patches [n, C] float32 of an RGB image; n = t h w of its `grid`.

    Raises:
      UserError: as `grid`.
    """
    grid = self.grid(image.size)
    done = self._wrapped.preprocess([image], return_tensors=None)
    patches = np.asarray(done['pixel_values'], np.float32)
    assert tuple(done['image_grid_thw'][0]) == grid and len(patches) == np.prod(grid)
    return patches

  def _use(self, wrapped: Any) -> None:
    least, most = wrapped.size['shortest_edge'], wrapped.size['longest_edge']
    factor = wrapped.patch_size * wrapped.merge_size
    if min(factor, wrapped.temporal_patch_size, least) < 1 or most < max(least, factor**2):
      raise UserError(
        f'An image processor needs sizes from 1 and 1 <= min_pixels <= max_pixels >= {factor**2} '
        f'(one token), not min_pixels={least} and max_pixels={most}.'
      )
    for step in ('do_resize', 'do_rescale', 'do_normalize'):
      if not getattr(wrapped, step):
        raise UserError(f'The image processor has {step} switched off; switch it on.')
    self._wrapped = wrapped
