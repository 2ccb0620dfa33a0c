"""Rotary positions of rows with images: time, height and width of every token, on the host.

Text counts on, the same on all three axes. The features of an image all stand at the time where it
begins, and count rows and columns from there; text goes on behind the largest of them. Each frame
of a video is an image of its own, since Qwen3-VL writes a timestamp before it.
"""

import numpy as np
from jaxtyping import Bool, Int

from dopd_jax.errors import UserError
from dopd_jax.models.config import DecoderConfig


def vision_positions(
  tokens: Int[np.ndarray, 'B T'],
  valid: Bool[np.ndarray, 'B T'],
  grid: Int[np.ndarray, 'B I 3'],
  config: DecoderConfig,
) -> Int[np.ndarray, 'B T 3']:
  """int32 positions for `Model.forward`: time, height and width, as transformers counts them.

  Args:
    tokens: ids, with one image or video id for each feature.
    valid: which are real; padding may be on either side, and its positions are 0.
    grid: t, h and w, in patches, of each row's images and videos, in the order of their
      placeholders; zeros where there is none.
    config: of the model.

  Raises: UserError if the model has no vision tower, if a grid doesn't divide by the merge size, or
    if the placeholders of a row are not its features.
  """
  tokens, valid, grid = np.asarray(tokens), np.asarray(valid, bool), np.asarray(grid)
  if config.vision is None and grid.any():
    raise UserError('This model reads text alone, but is given images: use a Qwen3-VL model.')
  positions = np.zeros((*tokens.shape, 3), np.int32)
  for b, (ids, real) in enumerate(zip(tokens, valid)):
    shapes = grid[b][grid[b].any(axis=1)]
    kinds = _kinds(ids[real], config)
    positions[b, real] = _row(kinds, _frames(kinds, shapes, config, b), b)
  return positions


def _kinds(ids, config) -> np.ndarray:
  """0 for text, 1 for an image's placeholder, 2 for a video's."""
  if config.vision is None:
    return np.zeros(len(ids), np.int32)
  return np.where(ids == config.image_token_id, 1, 2 * (ids == config.video_token_id))


def _frames(kinds, shapes, config, b) -> list[tuple[int, int, int]]:
  """What each run of placeholders stands for, (t, h, w) in features: an image, or a frame."""
  if not len(shapes):
    return []
  merge = config.vision.spatial_merge_size
  frames = []
  placeholders = kinds[kinds > 0]
  start = 0
  for t, h, w in shapes.tolist():
    if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
      raise UserError(
        f'Row {b} has an image of {t} x {h} x {w} patches: height and width must be positive '
        f'multiples of {merge}; resize images to multiples of '
        f'{merge * config.vision.patch_size} pixels.'
      )
    h, w = h // merge, w // merge
    video = start < len(placeholders) and placeholders[start] == 2
    frames += [(1, h, w)] * t if video else [(t, h, w)]
    start += t * h * w
  return frames


def _row(kinds, frames, b) -> np.ndarray:
  """[T, 3] for the real tokens of a row."""
  positions = np.zeros((len(kinds), 3), np.int32)
  needed = sum(t * h * w for t, h, w in frames)
  if needed != np.count_nonzero(kinds):
    raise UserError(
      f'Row {b} has {np.count_nonzero(kinds)} image or video ids for {needed} features: give one '
      'id for each, and cut no prompt through an image.'
    )
  at, start = 0, 0  # the next position, the next token
  for t, h, w in frames:
    first = start + int(np.argmax(kinds[start:] > 0))
    positions[start:first] = (at + np.arange(first - start))[:, None]
    at, start = at + first - start, first + t * h * w
    run = kinds[first:start]
    if not (run == run[0]).all():
      raise UserError(
        f'Row {b} has {t * h * w} features of one image or frame, whose ids do not stand side by '
        'side: put the grids of a row in the order of its placeholders.'
      )
    positions[first:start] = at + np.indices((t, h, w)).reshape(3, -1).T
    at += max(h, w)
  positions[start:] = (at + np.arange(len(kinds) - start))[:, None]
  return positions
