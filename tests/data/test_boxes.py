"""Boxes are read strictly, and the privileged text is Qwen3-VL's, to the character."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopd_jax.data import KINDS, parse_record, privileged_text
from dopd_jax.data.boxes import check_inside, to_pixels, to_thousand
from dopd_jax.errors import UserError

ROW = {'prompt': 'Why?', 'privileged_context': '', 'image': 'a.png'}
BOXES = [(10, 20, 60, 100), (0.0, 0.0, 200.0, 100.0)]
LABELS = ['dog', 'rote "Kugel" 球']
TEXT = (
  '[\n{"bbox_2d": [50, 200, 300, 1000], "label": "dog"},\n'
  '{"bbox_2d": [0, 0, 1000, 1000], "label": "rote \\"Kugel\\" 球"}\n]'
)


def parse(**columns):
  options = {key: columns.pop(key) for key in ('privileged_kind', 'box_format') if key in columns}
  return parse_record({**ROW, **columns}, 'train.jsonl line 3', default_id='x-3', **options)


def text(kind, **changed):
  parts = {'boxes': BOXES, 'labels': LABELS, 'caption': 'A dog.', 'answer': '4', 'size': (200, 100)}
  return privileged_text(kind, **{**parts, **changed})


def test_the_text_of_every_kind():
  boxes = '[\n{"bbox_2d": [50, 200, 300, 1000]},\n{"bbox_2d": [0, 0, 1000, 1000]}\n]'
  assert text('none') == ''
  assert text('caption') == 'A dog.'
  assert text('answer') == '4'
  assert text('box') == boxes
  assert text('label') == '[\n{"label": "dog"},\n{"label": "rote \\"Kugel\\" 球"}\n]'
  assert text('box+label') == TEXT
  assert text('box+caption') == boxes + '\nA dog.'
  assert set(KINDS) == {'none', 'caption', 'box', 'label', 'box+caption', 'box+label', 'answer'}
  assert [o['label'] for o in json.loads(TEXT)] == LABELS


def test_both_formats_give_one_text():
  thousand = [(50, 200, 300, 1000), (0, 0, 1000, 1000)]
  for size in (None, (7, 9000)):
    assert text('box+label', boxes=thousand, size=size, box_format='thousand') == TEXT
  assert to_pixels(thousand, 'thousand', (200, 100)) == BOXES


def test_no_boxes_and_no_words_are_no_context():
  assert text('box+label', boxes=[], labels=[]) == ''
  assert text('box', boxes=[]) == '' == text('caption', caption='')
  assert text('box+caption', boxes=[]) == 'A dog.'


@pytest.mark.parametrize('kind', [k for k, takes in KINDS.items() if takes])
def test_a_kind_needs_what_it_takes(kind):
  for column in KINDS[kind]:
    with pytest.raises(
      UserError, match=f'the record: there is no {column}.*{kind!r}'.replace('+', r'\+')
    ):
      text(kind, **{column: None})
  if 'boxes' in KINDS[kind]:
    with pytest.raises(UserError, match='no image to measure'):
      text(kind, size=None)
  with pytest.raises(UserError, match='privileged_kind'):
    text('boxes')


def test_rounding_goes_to_the_nearest_and_halves_up():
  # 1 pixel of 2000 is half a step; 3 are one and a half.
  assert to_thousand([(1, 3, 5, 7)], 'absolute', (2000, 2000)) == [[1, 2, 3, 4]]
  assert to_thousand([(0.4, 0.4, 999.6, 999.4)], 'thousand', None) == [[0, 0, 1000, 999]]
  # What is thinner than a step keeps one, also at the far edge.
  assert to_thousand([(1, 1, 2, 2)], 'absolute', (8000, 8000)) == [[0, 0, 1, 1]]
  assert to_thousand([(7999, 7999, 8000, 8000)], 'absolute', (8000, 8000)) == [
    [999, 999, 1000, 1000]
  ]


coordinates = st.floats(0, 1, allow_nan=False)
boxes_in_unit = st.tuples(coordinates, coordinates, coordinates, coordinates).map(
  lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@given(boxes_in_unit, st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=200, deadline=None)
def test_boxes_stay_boxes_and_come_back(unit, width, height):
  box = tuple(v * (width, height)[i % 2] for i, v in enumerate(unit))
  (whole,) = to_thousand([box], 'absolute', (width, height))
  x1, y1, x2, y2 = whole
  assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
  assert all(isinstance(v, int) for v in whole)
  (back,) = to_pixels([whole], 'thousand', (width, height))
  for i in range(4):
    # Half a step, and one more where a step had to be made.
    assert abs(back[i] - box[i]) <= (width, height)[i % 2] * 1.501e-3


def test_columns_of_a_record():
  record = parse(boxes=BOXES, labels=LABELS, caption='A dog.', colour='red')
  assert record.boxes == ((10.0, 20.0, 60.0, 100.0), (0.0, 0.0, 200.0, 100.0))
  assert record.labels == tuple(LABELS) and record.caption == 'A dog.'
  assert record.box_format == 'absolute' and record.extra == {'colour': 'red'}
  arrays = parse(boxes=np.array(BOXES, np.float32), labels=np.array(LABELS))
  assert arrays.boxes == record.boxes and arrays.labels == record.labels
  assert parse(boxes=[], labels=[]).boxes == () == parse(boxes=[]).boxes
  assert parse().boxes is None and parse().box_format is None
  thousand = parse(boxes=[[0, 0, 1000, 5]], box_format='thousand')
  assert thousand.box_format == 'thousand'
  row = {**ROW, 'boxes': [[0, 0, 1000, 5]], 'box_format': 'thousand'}
  assert parse_record(row, 'here', default_id='x').box_format == 'thousand'


def test_in_rows_without_images_these_are_columns_like_any_other():
  row = {'prompt': 'Why?', 'privileged_context': '', 'labels': 3, 'boxes': 'none', 'caption': 1}
  record = parse_record(row, 'here', default_id='x')
  assert record.extra == {'labels': 3, 'boxes': 'none', 'caption': 1}
  assert record.boxes is record.labels is record.caption is None


@pytest.mark.parametrize(
  'columns, words',
  [
    ({'boxes': 'none'}, 'boxes are a list'),
    ({'boxes': [1, 2, 3, 4]}, 'box 1 is four numbers'),
    ({'boxes': [[0, 0, 5, 5], [1, 2, 3]]}, 'box 2 is four numbers'),
    ({'boxes': [[1, 2, 3, '4']]}, 'box 1 is four numbers'),
    ({'boxes': [[1, 2, 3, None]]}, 'box 1 is four numbers'),
    ({'boxes': [[0, 0, 1, True]]}, 'box 1 is four numbers'),
    ({'boxes': [[0, 0, 1, float('nan')]]}, 'box 1 is four numbers'),
    ({'boxes': [[0, 0, 1, float('inf')]]}, 'box 1 is four numbers'),
    ({'boxes': [[0, 0, 1, 10**400]]}, 'box 1 is four numbers'),
    ({'boxes': [[5, 0, 1, 5]]}, 'box 1 is inverted'),
    ({'boxes': [[0, 5, 5, 1]]}, 'box 1 is inverted'),
    ({'boxes': [[0, 0, 5, 5], [2, 2, 2, 9]]}, 'box 2 has no area'),
    ({'boxes': [[0, 3, 5, 3]]}, 'box 1 has no area'),
    ({'boxes': [[0, 0, 1, 1]], 'labels': []}, '0 labels for 1 boxes'),
    ({'boxes': [[0, 0, 1, 1]], 'labels': ['a', 'b']}, '2 labels for 1 boxes'),
    ({'boxes': [[0, 0, 1, 1]], 'labels': [3]}, 'labels are a list of texts'),
    ({'labels': 'dog'}, 'labels are a list of texts'),
    ({'caption': 3}, 'caption is text'),
    ({'boxes': [[0, 0, 5, 1002]], 'box_format': 'thousand'}, '0 to 1000'),
    ({'boxes': [[-2, 0, 5, 9]], 'box_format': 'thousand'}, '0 to 1000'),
    ({'boxes': [], 'box_format': 'pixels'}, 'box_format is one of'),
    ({'privileged_kind': 'box'}, "no boxes, and data.privileged_kind='box'"),
    ({'privileged_kind': 'answer'}, "no answer, and data.privileged_kind='answer'"),
    ({'privileged_kind': 'boxes'}, 'privileged_kind'),
  ],
)  # fmt: skip
def test_a_mistake_names_its_place(columns, words):
  with pytest.raises(UserError, match=words) as error:
    parse(**columns)
  assert '\n' not in str(error.value)
  if 'privileged_kind is' not in str(error.value) and 'data.box_format' not in str(error.value):
    assert str(error.value).startswith('train.jsonl line 3: ')


def test_a_mistake_names_its_record():
  row = {'id': 'r7', 'prompt': 'Why?', 'privileged_context': '', 'image': 'a.png'}
  with pytest.raises(UserError, match=r'^train\.jsonl line 3, record r7: box 1 is inverted'):
    parse_record({**row, 'boxes': [[5, 0, 1, 5]]}, 'train.jsonl line 3', default_id='x')


def test_kinds_need_no_privileged_context():
  row = {'prompt': 'Why?', 'answer': '4', 'image': 'a.png', 'boxes': [[0, 0, 5, 5]]}
  for kind in ('none', 'answer', 'box'):
    record = parse_record(row, 'here', default_id='x', privileged_kind=kind)
    assert record.privileged_context == ('' if kind == 'none' else None)
  record = parse_record(
    {'prompt': 'x', 'caption': 'c'}, 'h', default_id='x', privileged_kind='caption'
  )
  assert record.caption == 'c'


@pytest.mark.parametrize(
  'box, fine',
  [
    ((0, 0, 20, 10), True),
    ((-0.9, -0.9, 20.9, 10.9), True),  # annotators round outwards
    ((0, 0, 21, 10), False),
    ((0, 0, 20, 11), False),
    ((-1, 0, 20, 10), False),
    ((20, 0, 20.5, 10), False),  # nothing of it is in the image
    ((500, 500, 600, 600), False),
    ((0.1, 0.2, 0.5, 0.9), False),  # fractions of the image, taken for pixels
    ((0, 0, 1, 1), True),
  ],
)
def test_boxes_lie_in_their_image(box, fine):
  box = tuple(float(v) for v in box)
  if fine:
    check_inside([box], 'absolute', (20, 10), 'Record r1')
    (cut,) = to_pixels([box], 'absolute', (20, 10))
    assert min(cut) >= 0 and cut[2] <= 20 and cut[3] <= 10
    return
  with pytest.raises(UserError, match=r'^Record r1: box 1 .*(20 x 10|fractions)'):
    check_inside([box], 'absolute', (20, 10), 'Record r1')
