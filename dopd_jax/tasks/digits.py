"""Digits and boxes: find the digit beside a coloured shape, read it, and reckon with it.

A picture has three or four real handwritten digits (scikit-learn's, 8 x 8 pixels), each to the
right of its owner, a circle, square, triangle or cross. A question names owners, and a completion
the cells (c0, c1, ..., row by row) in which they stand, with the digits:

    circle digit ?          ->   c2 7 = 7
    circle + square ?       ->   c2 7 c1 5 = 2      (modulo 10)

Naming where to look is planning, reading the value is execution: every word carries its kind by
construction (`token_kinds`). Which digit is asked for can be told by a box; how a digit is read
cannot, so that information and skill lie apart. That is why a label is by default the owner's name:
the digit itself as a label would make reading a matter of copying.

Every handwritten digit belongs to train or to test, by a hash of its pixels, before any picture is
composed: no picture of the test split shows a digit that was seen in training.
"""

import functools
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from dopd_jax.errors import UserError
from dopd_jax.tasks.common import SPLITS, field, in_split
from dopd_jax.tasks.words import word_tokenizer

SHAPES = ('circle', 'square', 'triangle', 'cross')
HINTS = ('none', 'box', 'label', 'box+label', 'answer', 'shuffled', 'mixed')
TRUE = ('box', 'label', 'box+label', 'answer')  # those that say something right
# For `dopd_jax.data.ImageProcessor(**PROCESSOR)`: a picture keeps its size, 16 tokens for 32 x 32
# pixels; a small crop is enlarged to 9 tokens or 12.
PROCESSOR = {'patch_size': 4, 'merge_size': 2, 'min_pixels': 24 * 24, 'max_pixels': 128 * 128}
_COLOURS = np.array([(255, 70, 70), (90, 150, 255), (255, 215, 40), (70, 225, 100)], np.float32)
_INK = np.full(3, 245, np.float32)
_SIDE = 8  # pixels of a handwritten digit


class Item(NamedTuple):
  """A digit of a picture: its owner, cell, handwriting, and the corners of digit and shape."""

  owner: str
  cell: int
  instance: int
  digit: tuple[int, int]  # x, y; pixels
  shape: tuple[int, int]


class Score(NamedTuple):
  """What is right in a completion.

  final: it ends with = and the right answer.
  plan: it names what was asked for, all of it, in order.
  execution: share of the stated values that are right for what they are stated of; 0 if none.
  """

  final: bool
  plan: bool
  execution: float


def tokenizer():
  """A Hugging Face tokenizer of this task: one token a word, with the tokens of images."""
  grid = [f'{axis}{i}' for axis in 'xy' for i in range(10)]
  cells = [f'c{i}' for i in range(9)]
  return word_tokenizer(
    ['=', '+', '?', 'digit', *'0123456789', *SHAPES, *cells, *grid], images=True
  )


def make_records(
  size: int,
  seed: int,
  *,
  canvas: int = 32,
  layout: int = 2,
  fewest: int = 3,
  most: int = 4,
  asked: int = 1,
  hint: str = 'box+label',
  label: str = 'owner',
  trace: str = 'cell',
  colours: str = 'shape',
  clutter: float = 0.3,
  jitter: float = 0.0,
  scale: int = 1,
  split: str = 'train',
) -> list[dict[str, Any]]:
  """Pictures with questions, boxes, hints, reference completions and answers.

  The pictures depend on neither `hint` nor `label` nor `trace`, so that the arms of a study are
  about the same problems, and those of a smaller `size` are the first ones of a larger. Boxes are
  around the digits asked for, in pixels, in the order of the question. A box in a hint is the words
  of its corners in tenths of the picture, `x1 y5 x3 y7`: of the first and of the last pixel.

  Args:
    size: number of records.
    seed: of the pictures and questions.
    canvas: side of the picture, pixels; a multiple of 8 keeps its size in the processor.
    layout: cells a side, 2 or 3.
    fewest: least number of digits in a picture.
    most: largest number, at most 4 (each has an owner of its own).
    asked: owners in the question; their digits are added modulo 10.
    hint: what the privileged context holds: 'none', 'box', 'label', 'box+label', 'answer',
      'shuffled' (boxes and labels of another picture) or 'mixed' (one of those that say something
      right; their form tells which).
    label: of a box: 'owner', or 'digit', which gives the values away.
    trace: what a completion names before each value: the 'cell', which must be found, or the
      'owner', which the question says. Cells lead a tiny model to the digit: one that has 96 %
      right after 300 steps with them has 39 % after 2,400 without.
    colours: 'shape', each shape has its own, or 'random'.
    clutter: how strong the texture behind the digits is, 0 to 1.
    jitter: how far digits move within their cells, 0 (each has its place, which tiny models learn
      several times faster) to 1.
    scale: pixels of the picture a pixel of the handwriting.
    split: 'train', 'test' or 'all'; tells which handwritten digits there are.

  Raises:
    UserError: an option is out of range, or scikit-learn is missing.
  """
  _check(size, seed, canvas, layout, fewest, most, asked, scale, clutter, jitter)
  for name, value, known in (
    ('hint', hint, HINTS),
    ('label', label, ('owner', 'digit')),
    ('trace', trace, ('owner', 'cell')),
    ('colours', colours, ('shape', 'random')),
    ('split', split, SPLITS),
  ):
    if value not in known:
      raise UserError(f'digits has no {name} {value!r}: choose one of {", ".join(known)}.')
  pixels, values, pools = _handwriting()
  draw = functools.partial(_draw, pools[split], canvas, layout, fewest, most, scale, jitter)
  paint = _Painter(pixels, canvas, layout, scale, colours, clutter)
  records = []
  for i in range(size):
    rng = np.random.default_rng([SPLITS.index(split), seed, i])
    items = draw(rng)
    told = items
    if hint == 'shuffled':
      told = draw(np.random.default_rng([SPLITS.index(split), seed, i, 1]))
    kind = hint
    if hint == 'mixed':
      kind = str(np.random.default_rng([SPLITS.index(split), seed, i, 2]).choice(TRUE))
    record_id = f'digits/{split}/{seed}/{i}'
    record = _record(record_id, items[:asked], values, canvas, scale, label, trace)
    record['privileged_context'] = _context(told[:asked], values, canvas, scale, kind, label)
    record['images'] = [_png(paint(rng, items))]
    records.append(record)
  return records


def score(record: Any, completion: str) -> Score:
  """Holds a completion against what its record asks for."""
  words = [word for word in completion.split() if not word.startswith('<|')]
  final = len(words) >= 2 and words[-2] == '=' and words[-1] == field(record, 'answer')
  steps = words[: words.index('=')] if '=' in words else words
  named, stated = steps[0::2], steps[1::2]
  wanted = list(field(record, 'plan'))
  right = dict(zip(wanted, (str(value) for value in field(record, 'values'))))
  hits = sum(right.get(name) == value for name, value in zip(named, stated))
  return Score(final, named == wanted, hits / len(stated) if stated else 0.0)


def verify(record: Any, completion: str) -> float:
  """1.0 where the completion ends with = and the right answer, else 0.0."""
  return float(score(record, completion).final)


def token_kinds(record: Any, completion_words: list[str]) -> list[str]:
  """'plan' for what is looked at, 'execution' for a value, 'other' for the rest."""
  del record  # the kind shows in the word itself
  kinds = dict.fromkeys([*SHAPES, *(f'c{i}' for i in range(9))], 'plan')
  kinds |= dict.fromkeys('0123456789', 'execution')
  return [kinds.get(word, 'other') for word in completion_words]


def _check(size, seed, canvas, layout, fewest, most, asked, scale, clutter, jitter):
  if size < 1 or seed < 0:
    raise UserError(f'digits needs size >= 1 and seed >= 0, not {size} and {seed}.')
  if layout not in (2, 3):
    raise UserError(f'digits needs a layout of 2 or 3 cells a side, not {layout}.')
  least = layout * (_SIDE + 4) * scale
  if scale < 1 or not least <= canvas <= 512:
    raise UserError(
      f'digits needs scale >= 1 and, for its layout and scale, a canvas from {least} to '
      f'512 pixels, not scale={scale} and canvas={canvas}.'
    )
  if not 1 <= asked <= fewest <= most <= len(SHAPES):
    raise UserError(
      f'digits needs 1 <= asked <= fewest <= most <= {len(SHAPES)}, not asked={asked}, '
      f'fewest={fewest} and most={most}.'
    )
  if not (0 <= clutter <= 1 and 0 <= jitter <= 1):
    raise UserError(f'digits needs clutter and jitter from 0 to 1, not {clutter} and {jitter}.')


@functools.cache
def _handwriting() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Pixels [n, 8, 8] in 0 to 1, values [n], and which instances each split has."""
  try:
    from sklearn.datasets import load_digits
  except ImportError:
    raise UserError(
      "The task digits needs scikit-learn: install it by pip install 'dopd_jax[tasks]'."
    ) from None
  digits: Any = load_digits()
  names = [image.astype(np.uint8).tobytes().hex() for image in digits.images]
  pools = {split: np.flatnonzero([in_split(name, split) for name in names]) for split in SPLITS}
  return digits.images.astype(np.float32) / 16, digits.target, pools


def _draw(pool, canvas, layout, fewest, most, scale, jitter, rng) -> list[Item]:
  """The digits of a picture; the first ones are those asked for."""
  cell, digit, mark = canvas // layout, _SIDE * scale, _mark(canvas, layout, scale)
  gap = min(scale, cell - digit - mark)
  count = int(rng.integers(fewest, most + 1))
  owners, cells = rng.permutation(len(SHAPES))[:count], rng.permutation(layout**2)[:count]
  instances = rng.choice(pool, count, replace=False)
  items = []
  for owner, place, instance in zip(owners, cells, instances):
    # Always to the left, like the bullet of a list: between two digits it would be either's.
    free = np.array([cell - mark - gap - digit, cell - digit])
    # Where nothing moves, a digit has its place at the right: with the default sizes, one token.
    shift = rng.integers(np.floor(free * jitter).astype(int) + 1)
    x = int(place % layout * cell + free[0] - shift[0])
    y = int(place // layout * cell + shift[1])
    spots = (x + mark + gap, y), (x, y + (digit - mark) // 2)
    items.append(Item(SHAPES[owner], int(place), int(instance), *spots))
  return items


class _Painter:
  """Paints pictures [canvas, canvas, 3] uint8: bright digits and shapes on a dark texture."""

  def __init__(self, pixels, canvas: int, layout: int, scale: int, colours: str, clutter: float):
    self._canvas, self._random, self._clutter = canvas, colours == 'random', clutter
    self._inks = pixels.repeat(scale, 1).repeat(scale, 2)
    self._masks = _masks(_mark(canvas, layout, scale))
    # Texture: a few random values, interpolated over the picture.
    knots = np.linspace(0, 5, canvas)
    self._spread = np.maximum(0, 1 - np.abs(knots[:, None] - np.arange(6))).astype(np.float32)
    self._along = np.linspace(0, 2 * np.pi, canvas, dtype=np.float32)

  def __call__(self, rng: np.random.Generator, items: list[Item]) -> np.ndarray:
    side = self._canvas
    patches = self._spread @ rng.random((3, 6, 6), np.float32) @ self._spread.T
    fx, fy, phase = rng.uniform(-6, 6, 3)
    stripes = np.sin(self._along * fx + self._along[:, None] * fy + phase)[..., None]
    noise = rng.random((side, side, 1), np.float32) - 0.5
    picture = 35 + self._clutter * (90 * np.moveaxis(patches, 0, -1) + 30 * stripes + 70 * noise)
    for item in items:
      owner = SHAPES.index(item.owner)
      colour = _COLOURS[rng.integers(len(SHAPES)) if self._random else owner]
      _blend(picture, item.digit, self._inks[item.instance], _INK)
      _blend(picture, item.shape, self._masks[owner], colour)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _blend(picture: np.ndarray, corner: tuple[int, int], mask: np.ndarray, colour: np.ndarray):
  (x, y), side = corner, len(mask)
  part = picture[y : y + side, x : x + side]
  part += mask[..., None] * (colour - part)


def _mark(canvas: int, layout: int, scale: int) -> int:
  """Side of an owner's shape, pixels."""
  room = canvas // layout - _SIDE * scale
  return min(6 * scale, room - (scale if room > 4 * scale else 0))


def _masks(side: int) -> list[np.ndarray]:
  """Each shape [side, side] as 0 to 1."""
  fine = (np.arange(side * 4, dtype=np.float32) + 0.5) / (side * 2) - 1  # four samples a pixel
  x, y = np.meshgrid(fine, fine)
  shapes = {
    'circle': x**2 + y**2 <= 1,
    'square': np.ones_like(x, bool),
    'triangle': np.abs(x) <= (y + 1) / 2,
    'cross': (np.abs(x - y) < 0.45) | (np.abs(x + y) < 0.45),
  }
  return [shapes[name].reshape(side, 4, side, 4).mean((1, 3)).astype(np.float32) for name in SHAPES]


def _record(record_id, asked, values, canvas, scale, label, trace) -> dict[str, Any]:
  owners = [item.owner for item in asked]
  read = [int(values[item.instance]) for item in asked]
  answer = str(sum(read) % 10)
  plan = owners if trace == 'owner' else [f'c{item.cell}' for item in asked]
  steps = ' '.join(f'{name} {value}' for name, value in zip(plan, read))
  question = f'{owners[0]} digit ?' if len(owners) == 1 else ' + '.join(owners) + ' ?'
  return {
    'id': record_id,
    'prompt': question,
    'boxes': [_box(item, scale) for item in asked],
    'labels': owners if label == 'owner' else [str(value) for value in read],
    'completion': f'{steps} = {answer}',
    'answer': answer,
    'verifier': 'digits',
    'plan': plan,
    'values': read,
  }


def _box(item: Item, scale: int) -> list[int]:
  x, y = item.digit
  return [x, y, x + _SIDE * scale, y + _SIDE * scale]


def _context(told, values, canvas, scale, hint, label) -> str:
  """The words of a hint about the digits asked for."""
  if hint == 'none':
    return ''
  read = [int(values[item.instance]) for item in told]
  if hint == 'answer':
    return str(sum(read) % 10)
  words = []
  for item, value in zip(told, read):
    if hint != 'box':
      words.append(item.owner if label == 'owner' else str(value))
    if hint != 'label':
      x1, y1, x2, y2 = _box(item, scale)
      tenths = (('x', x1), ('y', y1), ('x', x2 - 1), ('y', y2 - 1))
      words += [f'{axis}{pixel * 10 // canvas}' for axis, pixel in tenths]
  return ' '.join(words)


def _png(pixels: np.ndarray) -> bytes:
  """A picture as PNG, not compressed: the same bytes on every machine, and quickly made."""
  height, width, _ = pixels.shape
  # Every line of a PNG begins with the number of its filter, 0 for none.
  lines = np.zeros((height, 1 + width * 3), np.uint8)
  lines[:, 1:] = pixels.reshape(height, width * 3)
  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  chunks = ((b'IHDR', head), (b'IDAT', zlib.compress(lines.tobytes(), 0)), (b'IEND', b''))
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    for name, data in chunks
  )
