"""The image task holds what it promises: real digits, no leak between splits, honest boxes."""

import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from dopd_jax import tasks
from dopd_jax.data import (
  ImageInputs,
  ImageProcessor,
  Renderer,
  example_images,
  make_pipeline,
  parse_record,
  view_grids,
)
from dopd_jax.errors import UserError
from dopd_jax.tasks import digits, words
from dopd_jax.tasks.digits import HINTS, SHAPES, TRUE, make_records, score, token_kinds, verify

IMAGES = load_digits().images
TARGETS = load_digits().target
COLOURS = dict(zip(SHAPES, digits._COLOURS.astype(int)))

options = st.fixed_dictionaries(
  {
    'seed': st.integers(0, 10**6),
    'canvas': st.sampled_from([40, 48, 64]),
    'layout': st.sampled_from([2, 3]),
    'asked': st.integers(1, 3),
    'jitter': st.sampled_from([0.0, 0.5, 1.0]),
    'trace': st.sampled_from(['owner', 'cell']),
    'split': st.sampled_from(['train', 'test', 'all']),
  }
)


def pixels(record):
  return np.asarray(Image.open(io.BytesIO(record['images'][0])))


def handwriting(record, scale=1):
  """Which of scikit-learn's digits stands in each box, by its pixels and nothing else."""
  found = []
  for x1, y1, x2, y2 in record['boxes']:
    # Without clutter a pixel is dark grey (35) where there is no ink and 245 where it is full.
    part = pixels(record)[y1:y2:scale, x1:x2:scale, 0].astype(float)
    difference = np.abs(IMAGES / 16 - (part - 35) / 210).max((1, 2))
    assert difference.min() < 0.01
    found.append(int(difference.argmin()))
  return found


def shape_of(record, box):
  """The colour of what stands to the left of a box, as the name of its shape."""
  x1, y1, _, y2 = box
  left = pixels(record)[y1:y2, max(0, x1 - 5) : x1].reshape(-1, 3).astype(int)
  hits = {name: (np.abs(left - colour).max(1) < 3).sum() for name, colour in COLOURS.items()}
  return max(hits, key=hits.get)


@given(options)
@settings(max_examples=25, deadline=None)
def test_pictures_show_what_records_say(options):
  for record in make_records(3, clutter=0.0, **options):
    assert pixels(record).shape == (options['canvas'], options['canvas'], 3)
    values = [int(TARGETS[i]) for i in handwriting(record)]
    owners = [shape_of(record, box) for box in record['boxes']]
    assert values == record['values'] and owners == record['labels']
    assert record['answer'] == str(sum(values) % 10)
    asked = ' + '.join(owners) + ' ?' if len(owners) > 1 else f'{owners[0]} digit ?'
    assert record['prompt'] == asked and len(owners) == options['asked']
    cell = options['canvas'] // options['layout']
    centres = [((x1 + x2) // 2, (y1 + y2) // 2) for x1, y1, x2, y2 in record['boxes']]
    cells = [f'c{y // cell * options["layout"] + x // cell}' for x, y in centres]
    assert record['plan'] == (owners if options['trace'] == 'owner' else cells)
    steps = ' '.join(f'{name} {value}' for name, value in zip(record['plan'], values))
    assert record['completion'] == f'{steps} = {record["answer"]}'
    assert score(record, record['completion']) == (True, True, 1.0)


def test_no_digit_of_the_test_split_is_seen_in_training():
  seen = {}
  for split in ('train', 'test', 'all'):
    # Digits that are not asked for count too: all of them are asked for here.
    records = make_records(700, 0, split=split, clutter=0.0, fewest=4, asked=4)
    seen[split] = {i for record in records for i in handwriting(record)}
    assert {int(TARGETS[i]) for i in seen[split]} == set(range(10))
  assert not seen['train'] & seen['test']
  assert len(seen['test']) > 400 and len(seen['train']) > 1100
  again = make_records(100, 99, split='test', clutter=0.0, fewest=4, asked=4)
  assert not {i for r in again for i in handwriting(r)} & seen['train']
  train, test, everything = (digits._handwriting()[2][s] for s in ('train', 'test', 'all'))
  assert sorted([*train, *test]) == list(everything) == list(range(1797))


def test_arms_are_about_the_same_pictures():
  first = make_records(5, 3)
  assert make_records(9, 3)[:5] == first
  for changed in (*({'hint': hint} for hint in HINTS), {'label': 'digit'}, {'trace': 'owner'}):
    for one, other in zip(first, make_records(5, 3, **changed)):
      for column in ('prompt', 'images', 'boxes', 'answer', 'values'):
        assert one[column] == other[column]
  assert make_records(5, 4) != first != make_records(5, 3, split='test')
  assert len({record['images'][0] for record in make_records(500, 0)}) == 500


def test_hints():
  def context(hint, **more):
    return [r['privileged_context'] for r in make_records(200, 5, hint=hint, **more)]

  records = make_records(200, 5)
  boxes = [
    ' '.join(f'{axis}{pixel * 10 // 32}' for axis, pixel in zip('xyxy', (x1, y1, x2 - 1, y2 - 1)))
    for ((x1, y1, x2, y2),) in (r['boxes'] for r in records)
  ]
  owners = [r['labels'][0] for r in records]
  assert context('none') == [''] * 200
  assert context('box') == boxes and context('label') == owners
  assert context('box+label') == [f'{o} {b}' for o, b in zip(owners, boxes)]
  assert context('answer') == [r['answer'] for r in records]
  given_away = context('box+label', label='digit')
  assert given_away == [f'{r["answer"]} {b}' for r, b in zip(records, boxes)]
  mixed = context('mixed')
  kinds = [context(kind) for kind in TRUE]
  counts = [sum(m == k for m, k in zip(mixed, kind)) for kind in kinds]
  assert sum(counts) == 200 and min(counts) > 30
  assert mixed[:20] == [r['privileged_context'] for r in make_records(20, 5, hint='mixed')]
  shuffled = context('shuffled')
  assert [len(c.split()) for c in shuffled] == [5] * 200
  same = np.mean([s == c for s, c in zip(shuffled, context('box+label'))])
  assert same < 0.15  # 1 of 4 shapes in 1 of 4 cells


def test_values_and_places_are_balanced():
  records = make_records(3000, 0)
  share = np.bincount([r['values'][0] for r in records], minlength=10) / 3000
  assert share.min() > 0.07 and share.max() < 0.13
  for column in ('plan', 'labels'):
    _, counts = np.unique([r[column][0] for r in records], return_counts=True)
    assert len(counts) == 4 and counts.min() > 650


@pytest.mark.parametrize(
  'completion, wanted',
  [
    ('c2 7 c1 5 = 2', (True, True, 1.0)),
    ('c2 7 c1 5 = 2 <|im_end|>', (True, True, 1.0)),
    ('c2 7 c1 5 = 3', (False, True, 1.0)),
    ('c2 7 c1 4 = 2', (True, True, 0.5)),
    ('c1 5 c2 7 = 2', (True, False, 1.0)),
    ('c0 7 c1 5 = 2', (True, False, 0.5)),
    ('c2 7 = 2', (True, False, 1.0)),
    ('= 2', (True, False, 0.0)),
    ('2', (False, False, 0.0)),
    ('c2 7 c1 5 = 2 2', (False, True, 1.0)),
    ('c2 7 c1 5', (False, True, 1.0)),
    ('', (False, False, 0.0)),
  ],
)
def test_scores(completion, wanted):
  record = {'answer': '2', 'plan': ['c2', 'c1'], 'values': [7, 5], 'verifier': 'digits'}
  assert score(record, completion) == wanted
  assert verify(record, completion) == float(wanted[0]) == tasks.verify(record, completion)


def test_every_word_is_known_and_has_its_kind():
  tokenizer = digits.tokenizer()
  for trace in ('owner', 'cell'):
    for hint in HINTS:
      for label in ('owner', 'digit'):
        layout = {'canvas': 48, 'layout': 3, 'asked': 2, 'fewest': 3}
        for record in make_records(30, 1, trace=trace, hint=hint, label=label, **layout):
          for column in ('prompt', 'privileged_context', 'completion'):
            ids = tokenizer(record[column])['input_ids']
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(record[column].split())
          kinds = token_kinds(record, record['completion'].split())
          assert kinds == ['plan', 'execution'] * 2 + ['other', 'execution']


def test_the_template_writes_images_as_qwen3_vl_does():
  tokenizer = digits.tokenizer()
  content = [{'type': 'image'}, {'type': 'text', 'text': 'circle digit ?'}]
  text = tokenizer.apply_chat_template([{'role': 'user', 'content': content}], tokenize=False)
  assert text.split() == ['<|user|>', *words.VISION, 'circle', 'digit', '?']
  # A tokenizer without images is what it was.
  plain = words.word_tokenizer(['a'])
  assert plain.chat_template == words.CHAT_TEMPLATE
  assert words.IMAGE_TOKEN not in plain.get_vocab()


def test_from_spec_to_batches():
  tokenizer = digits.tokenizer()
  processor = ImageProcessor(**digits.PROCESSOR)
  inputs = ImageInputs(processor, tokenizer.convert_tokens_to_ids(words.IMAGE_TOKEN))
  pipeline = make_pipeline(
    [('task:digits?size=16&seed=0&hint=box+label', None)],
    Renderer(tokenizer, images=inputs),
    batch_size=8,
    seed=0,
    max_prompt_tokens=40,
    max_completion_tokens=5,
    loaders={'task': tasks.load},
  )
  for example in next(pipeline):
    assert example.grids == ((1, 8, 8),)
    assert example.prompt_ids.count(inputs.image_token_id) == 16
    # Two roles, two around the image, three words; and a heading, a label and four corners.
    assert len(example.prompt_ids) == 16 + 7 and len(example.privileged_ids) == 16 + 13
    assert len(example.completion_ids) == 5
    for view, sizes in (('full', {64}), ('degraded', {64}), ('crop', {36, 48})):
      patches, grids = example_images(example, processor, view)
      assert len(patches[0]) in sizes and patches[0].shape[1] == processor.channels == 96
      assert tuple(grids) == view_grids(example, processor, view)


def test_records_are_what_the_parser_reads():
  row = make_records(1, 0)[0]
  record = parse_record(row, 'here', default_id='x')
  assert record.id == 'digits/train/0/0' and record.images == tuple(row['images'])
  assert record.boxes == tuple(tuple(map(float, box)) for box in row['boxes'])
  assert verify(record, row['completion']) == 1.0


@pytest.mark.parametrize('colours', ['shape', 'random'])
def test_the_look(colours):
  for canvas, layout, scale in ((24, 2, 1), (32, 2, 1), (48, 3, 1), (64, 2, 2)):
    for record in make_records(
      20, 0, canvas=canvas, layout=layout, scale=scale, colours=colours, clutter=0.5, jitter=1.0
    ):
      picture = pixels(record)
      assert picture.shape == (canvas, canvas, 3)
      ((x1, y1, x2, y2),) = record['boxes']
      assert x1 >= 0 and x2 <= canvas and y1 >= 0 and y2 <= canvas
      # Ink stands out from the texture.
      assert np.quantile(picture[y1:y2, x1:x2], 0.9) > np.median(picture) + 60


def test_shapes_differ():
  for side in (3, 4, 6, 12):
    masks = digits._masks(side)
    for i, one in enumerate(masks):
      assert one.max() > 0.9 and one.min() >= 0
      for other in masks[:i]:
        assert np.abs(one - other).mean() > 0.1


@pytest.mark.parametrize(
  'spec, words',
  [
    ('digits?seed=0', 'size'),
    ('digits?size=0&seed=0', 'size >= 1'),
    ('digits?size=4&seed=0&canvas=23', 'canvas from 24'),
    ('digits?size=4&seed=0&canvas=32&layout=3', 'canvas from 36'),
    ('digits?size=4&seed=0&layout=4', 'layout of 2 or 3'),
    ('digits?size=4&seed=0&asked=4', 'asked <= fewest'),
    ('digits?size=4&seed=0&most=5', 'most <= 4'),
    ('digits?size=4&seed=0&hint=boxes', 'no hint'),
    ('digits?size=4&seed=0&label=colour', 'no label'),
    ('digits?size=4&seed=0&trace=word', 'no trace'),
    ('digits?size=4&seed=0&colours=red', 'no colours'),
    ('digits?size=4&seed=0&split=val', 'no split'),
    ('digits?size=4&seed=0&clutter=2', 'clutter'),
    ('digits?size=4&seed=0&jitter=-1', 'jitter'),
    ('digits?size=4&seed=0&scale=0', 'scale'),
    ('digits?size=4&seed=0&canvass=32', "did you mean 'canvas'"),
    ('digits?size=4&seed=0&canvas=32.5', 'a whole number as canvas'),
  ],
)
def test_mistakes_in_a_spec(spec, words):
  with pytest.raises(UserError, match=words) as error:
    tasks.load(spec)
  assert '\n' not in str(error.value)


def test_without_scikit_learn(monkeypatch):
  digits._handwriting.cache_clear()
  monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
  with pytest.raises(UserError, match=r"scikit-learn: .*pip install 'dopd_jax\[tasks\]'"):
    make_records(1, 0)
