"""Boxes and labels of an image: strict reading, units, and the privileged text made of them.

A box is (x1, y1, x2, y2): its left, upper, right and lower edge, x to the right and y down. As
'absolute' its numbers are pixels of the original image, as 'thousand' they run from 0 to 1000 over
the image's width and height. The privileged text is in Qwen3-VL's own convention, a JSON list of
objects with whole numbers from 0 to 1000:

    [
    {"bbox_2d": [112, 40, 530, 997], "label": "dog"},
    {"bbox_2d": [0, 0, 96, 210], "label": "red ball"}
    ]
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dopd_jax.errors import UserError

Box = tuple[float, float, float, float]
FORMATS = ('absolute', 'thousand')
# What a privileged context is made of -> the columns that it takes.
KINDS: dict[str, tuple[str, ...]] = {
  'none': (),
  'caption': ('caption',),
  'box': ('boxes',),
  'label': ('labels',),
  'box+caption': ('boxes', 'caption'),
  'box+label': ('boxes', 'labels'),
  'answer': ('answer',),
}
# Annotators round outwards: a box may end less than this beyond the image, and is cut off there.
_SLACK = 1.0


def check_options(kind: str, box_format: str) -> None:
  """Raises a UserError where there is no such privileged kind or box format."""
  if kind != 'column' and kind not in KINDS:
    raise UserError(f"data.privileged_kind is 'column' or one of {', '.join(KINDS)}, not {kind!r}.")
  if box_format not in FORMATS:
    raise UserError(f'data.box_format is one of {", ".join(FORMATS)}, not {box_format!r}.')


def check_kind(kind: str, columns: Mapping[str, Any], names: Mapping[str, str], where: str) -> None:
  """Raises a UserError where a row lacks a column that a privileged kind takes.

  Args:
    kind: 'column' or a key of `KINDS`.
    columns: our column name -> value or None.
    names: our column name -> its name in the data.
    where: the place of the row.
  """
  for column in KINDS.get(kind, ()):
    if columns.get(column) is None:
      raise UserError(
        f'{where}: there is no {names.get(column, column)}, and data.privileged_kind={kind!r} is '
        'made of it; add this column (it may be empty), or choose another kind.'
      )


def parse_columns(
  values: Mapping[str, Any], names: Mapping[str, str], box_format: str, where: str
) -> dict[str, Any]:
  """The columns boxes, labels, caption and box_format of a row, checked without its image.

  Args:
    values: our column name -> value or None.
    names: our column name -> its name in the data.
    box_format: of the boxes.
    where: the place of the row, for errors.

  Returns:
    boxes (tuple of boxes), labels (tuple of text), caption (text) and box_format, each or None.

  Raises:
    UserError: a box of other than four finite numbers, inverted or without area; a label that is no
      text; another number of labels than boxes.
  """
  if box_format not in FORMATS:
    raise UserError(f'{where}: box_format is one of {", ".join(FORMATS)}, not {box_format!r}.')
  boxes, labels, caption = (values.get(name) for name in ('boxes', 'labels', 'caption'))
  if caption is not None and not isinstance(caption, str):
    raise UserError(f'{where}: the {names["caption"]} is text, not a {type(caption).__name__}.')
  if boxes is not None:
    items = _listed(boxes)
    if items is None:
      raise UserError(
        f'{where}: the {names["boxes"]} are a list of [x1, y1, x2, y2], not a '
        f'{type(boxes).__name__}.'
      )
    boxes = tuple(_box(item, f'{where}: box {i}') for i, item in enumerate(items, start=1))
    if box_format == 'thousand':
      _check_within(boxes, 1000, 1000, where, 'the 0 to 1000 of its format')
  if labels is not None:
    items = _listed(labels)
    if items is None or not all(isinstance(label, str) for label in items):
      raise UserError(f'{where}: the {names["labels"]} are a list of texts, one a box.')
    labels = tuple(items)
  if boxes is not None and labels is not None and len(boxes) != len(labels):
    raise UserError(
      f'{where}: {len(labels)} {names["labels"]} for {len(boxes)} {names["boxes"]}; '
      'give each box one label.'
    )
  box_format_or_none = None if boxes is None else box_format
  return {'boxes': boxes, 'labels': labels, 'caption': caption, 'box_format': box_format_or_none}


def check_inside(boxes: Sequence[Box], box_format: str, size: tuple[int, int], where: str) -> None:
  """Raises a UserError where a box leaves the image by a pixel or more, or is in fractions of it.

  Args:
    boxes: in the units of `box_format`.
    box_format: 'absolute' or 'thousand'.
    size: (width, height) of the image, pixels.
    where: the record, for the error.
  """
  if box_format == 'absolute':
    _check_within(boxes, *size, where, f'its image of {size[0]} x {size[1]} pixels')
    for number, box in enumerate(boxes, start=1):
      if max(box) <= 1 and not all(value.is_integer() for value in box):
        raise UserError(
          f'{where}: box {number} {list(box)} is less than a pixel and looks like fractions of the '
          "image; multiply them by 1000 and set box_format='thousand'."
        )


def to_pixels(boxes: Sequence[Box], box_format: str, size: tuple[int, int]) -> list[Box]:
  """Boxes in pixels of an image of size (width, height), cut off at its edges."""
  scale = (1.0, 1.0) if box_format == 'absolute' else (size[0] / 1000, size[1] / 1000)
  return [
    (
      min(max(x1 * scale[0], 0.0), size[0]),
      min(max(y1 * scale[1], 0.0), size[1]),
      min(max(x2 * scale[0], 0.0), size[0]),
      min(max(y2 * scale[1], 0.0), size[1]),
    )
    for x1, y1, x2, y2 in boxes
  ]


def to_thousand(
  boxes: Sequence[Box], box_format: str, size: tuple[int, int] | None
) -> list[list[int]]:
  """Boxes as whole numbers from 0 to 1000, rounded to the nearest and never without area.

  Args:
    boxes: in the units of `box_format`.
    box_format: 'absolute' or 'thousand'.
    size: (width, height) of the image, pixels; may be None for 'thousand'.
  """
  result = []
  for box in boxes:
    if box_format == 'absolute':
      assert size is not None
      box = [value / size[i % 2] * 1000 for i, value in enumerate(box)]
    # Halves go up: the built-in round would send them to the even neighbour.
    x1, y1, x2, y2 = (min(max(math.floor(value + 0.5), 0), 1000) for value in box)
    # A box thinner than the grid keeps one step of it.
    x1, x2 = _apart(x1, x2)
    y1, y2 = _apart(y1, y2)
    result.append([x1, y1, x2, y2])
  return result


def privileged_text(
  kind: str,
  boxes: Sequence[Box] | None,
  labels: Sequence[str] | None,
  caption: str | None,
  answer: str | None,
  size: tuple[int, int] | None,
  box_format: str = 'absolute',
  where: str = 'the record',
) -> str:
  """The privileged context of a kind: boxes and labels as in the module's example.

  'box' leaves the labels out, 'label' the boxes; 'box+caption' has the boxes, then the caption on
  lines of its own. No boxes (an empty list) and no words make an empty context.

  Args:
    kind: a key of `KINDS`.
    boxes: in the units of `box_format`.
    labels: one a box.
    caption: of the image.
    answer: to the question.
    size: (width, height) of the image, pixels; needed for absolute boxes.
    box_format: 'absolute' or 'thousand'.
    where: the record, for errors.

  Raises:
    UserError: no such kind, a part that it takes is None, or absolute boxes without an image.
  """
  check_options(kind, box_format)
  parts = {'boxes': boxes, 'labels': labels, 'caption': caption, 'answer': answer}
  check_kind(kind, parts, {}, where)
  takes = KINDS[kind]
  objects: list[dict[str, Any]] = []
  if 'boxes' in takes and boxes:
    if box_format == 'absolute' and size is None:
      raise UserError(
        f'{where}: its boxes are in pixels and it has no image to measure them by; '
        "give the image, or boxes from 0 to 1000 with box_format='thousand'."
      )
    objects = [{'bbox_2d': box} for box in to_thousand(boxes, box_format, size)]
  if 'labels' in takes and labels:
    objects = objects or [{} for _ in labels]
    objects = [{**item, 'label': label} for item, label in zip(objects, labels, strict=True)]
  lines = ',\n'.join(json.dumps(item, ensure_ascii=False) for item in objects)
  texts = [f'[\n{lines}\n]'] if objects else []
  texts += [str(parts[name]) for name in ('caption', 'answer') if name in takes and parts[name]]
  return '\n'.join(texts)


def _box(item: Any, where: str) -> Box:
  numbers = _listed(item) or []
  fine = len(numbers) == 4 and all(
    isinstance(n, int | float) and not isinstance(n, bool) for n in numbers
  )
  # No picture is so large, and no comparison is true of NaN.
  if not fine or not all(-1e9 < n < 1e9 for n in numbers):
    raise UserError(f'{where} is four numbers [x1, y1, x2, y2], not {str(item)[:60]}.')
  x1, y1, x2, y2 = (float(n) for n in numbers)
  if x2 < x1 or y2 < y1:
    raise UserError(
      f'{where} is inverted, {numbers}: write [x1, y1, x2, y2] with x1 < x2 and y1 < y2 '
      '(a box given as x, y, width and height must be converted).'
    )
  if x2 == x1 or y2 == y1:
    raise UserError(f'{where} has no area, {numbers}; remove or repair it.')
  return (x1, y1, x2, y2)


def _check_within(boxes: Sequence[Box], width: int, height: int, where: str, what: str) -> None:
  for number, box in enumerate(boxes, start=1):
    x1, y1, x2, y2 = box
    outside = min(x1, y1) <= -_SLACK or x2 >= width + _SLACK or y2 >= height + _SLACK
    # What is left of it after cutting must still be a box.
    if outside or min(x2, y2) <= 0 or x1 >= width or y1 >= height:
      raise UserError(
        f'{where}: box {number} {[round(v, 2) for v in box]} is outside {what}; '
        'repair it, or name its units in box_format.'
      )


def _apart(low: int, high: int) -> tuple[int, int]:
  if low < high:
    return low, high
  return (low, low + 1) if low < 1000 else (999, 1000)


def _listed(value: Any) -> list[Any] | None:
  """Lists, tuples and arrays as a list of Python values; None for anything else."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  return list(value) if isinstance(value, list | tuple) else None
