"""From rows with images to examples: sources, lengths, contexts of boxes, identity."""

import base64
import dataclasses
import json
import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dopd_jax.data import (
  Pipeline,
  Record,
  Renderer,
  example_images,
  make_pipeline,
  open_source,
  parse_record,
  read_image,
  tokenise,
  write_array_record,
)
from dopd_jax.errors import UserError
from dopd_jax.tasks.words import word_tokenizer
from tests.data.pictures import PROCESSOR, WORDS, encoded, picture, png, renderer, tokenizer

RENDERER = renderer()
PAD = RENDERER.images.image_token_id
ROW = {'prompt': 'what is this', 'privileged_context': 'dog'}


def parse(row, **options):
  return parse_record({**ROW, **row}, 'train.jsonl line 3', default_id='x-3', **options)


def make(records, **options):
  return tokenise(records, RENDERER, **{'max_prompt_tokens': 200, **options})


# Columns


def test_images_are_one_or_several_sources():
  data = png()
  assert parse({'image': data}).images == (data,) == parse({'images': [data]}).images
  assert parse({'images': ('a.png', data)}).images == ('a.png', data)
  for none in ({}, {'images': None}, {'images': []}, {'image': None}):
    assert parse(none).images == ()
  assert len(parse({'images': np.zeros((2, 4, 4, 3), np.uint8)}).images) == 2
  assert len(parse({'image': np.zeros((4, 4, 3), np.uint8)}).images) == 1
  record = parse({'picture': data, 'image': 'theirs'}, columns={'images': 'picture'})
  assert record.images == (data,) and record.extra == {'image': 'theirs'}


def test_images_in_the_parts_of_messages():
  uri = 'data:image/png;base64,' + base64.b64encode(png()).decode()
  parts = [
    {'type': 'image_url', 'image_url': {'url': uri}, 'text': None},
    {'type': 'text', 'text': 'what', 'image_url': None},
    {'type': 'image', 'image': {'bytes': png(), 'path': None}},
  ]
  record = parse({'prompt': [{'role': 'user', 'content': parts}]})
  assert record.images == (uri, {'bytes': png(), 'path': None})
  image = {'type': 'image'}
  assert record.prompt == [
    {'role': 'user', 'content': [image, {'type': 'text', 'text': 'what'}, image]}
  ]
  json.dumps(record.prompt)
  # Text in parts is text, whatever reads it.
  words = [{'type': 'text', 'text': 'what '}, {'type': 'text', 'text': 'is'}]
  assert parse({'prompt': [{'role': 'user', 'content': words}]}).prompt == [
    {'role': 'user', 'content': 'what is'}
  ]


@pytest.mark.parametrize(
  'row, words',
  [
    ({'image': 3}, 'column image holds a int'),
    ({'images': [png(), None]}, 'column images holds a NoneType'),
    ({'image': 'a', 'images': ['b']}, 'both columns images and image'),
    ({'prompt': [{'role': 'user', 'content': [{'type': 'video'}]}]}, 'a part of the content'),
    ({'prompt': [{'role': 'user', 'content': ['what']}]}, 'a part of the content'),
    ({'prompt': [{'role': 'user', 'content': [{'type': 'text', 'text': 3}]}]}, 'a number'),
    ({'prompt': [{'role': 'user', 'content': []}]}, 'empty last user message'),
    ({'prompt': [{'role': 'user', 'content': [{'type': 'text', 'text': ' '}]}]}, 'empty last'),
    (
      {'prompt': [{'role': 'user', 'content': [{'type': 'image', 'image': 'a'}]}], 'image': 'b'},
      'give them once',
    ),
  ],
)
def test_mistakes_in_a_row(row, words):
  with pytest.raises(UserError, match=words) as error:
    parse(row)
  assert str(error.value).startswith('train.jsonl line 3: ') and '\n' not in str(error.value)


# Files


def test_paths_are_relative_to_the_file_of_the_rows(tmp_path, monkeypatch):
  (tmp_path / 'data' / 'images').mkdir(parents=True)
  (tmp_path / 'data' / 'images' / 'a.png').write_bytes(png())
  (tmp_path / 'more').mkdir()
  (tmp_path / 'more' / 'b.png').write_bytes(png(8, 8))
  rows = [
    {**ROW, 'image': 'images/a.png'},
    {**ROW, 'image': {'bytes': None, 'path': 'images/a.png'}},
    {**ROW, 'image': 'data/images/a.png'},  # from where the command runs
    {**ROW, 'image': str(tmp_path / 'data' / 'images' / 'a.png')},
    {**ROW, 'image': 'b.png'},
    {**ROW, 'image': str(tmp_path / 'more' / 'b.png')},
  ]
  path = tmp_path / 'data' / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  monkeypatch.chdir(tmp_path)
  for spec in (str(path), 'data/rows.jsonl', 'data/*.jsonl'):
    source = open_source(spec, image_folder=str(tmp_path / 'more'))
    assert [e.sizes for e in make(source).examples] == [((16, 16),)] * 4 + [((8, 8),)] * 2


@pytest.mark.parametrize('how', ['dots', 'absolute', 'link', 'part', 'mapping', 'long', 'cwd'])
def test_no_path_leads_out_of_the_folder_of_the_data(tmp_path, monkeypatch, how):
  secret = tmp_path / 'secret.png'
  secret.write_bytes(png())
  folder = tmp_path / 'data'
  folder.mkdir()
  (folder / 'link.png').symlink_to(secret)
  (tmp_path / 'data2').mkdir()  # begins like the folder and is another
  (tmp_path / 'data2' / 'x.png').write_bytes(png())
  image = {
    'dots': '../secret.png',
    'absolute': str(secret),
    'link': 'link.png',
    'part': str(tmp_path / 'data2' / 'x.png'),
    'mapping': {'bytes': None, 'path': '../secret.png'},
    'long': './' * 600 + '../secret.png',
    'cwd': 'secret.png',
  }[how]
  path = folder / 'rows.jsonl'
  path.write_text(json.dumps({**ROW, 'id': 'p7', 'image': image}))
  monkeypatch.chdir(folder if how != 'cwd' else tmp_path)
  for spec in (str(path), *(['rows.jsonl'] if how != 'cwd' else [])):
    with pytest.raises(UserError, match=r'record p7: the image .*outside.*image_folder'):
      open_source(spec)
  # Who trusts the data says so.
  assert make(open_source(str(path), image_folder='/')).examples[0].sizes == ((16, 16),)


def test_hugging_face_parquet_and_array_record(tmp_path):
  rows = [
    {**ROW, 'id': 'a', 'image': {'bytes': png(), 'path': 'a.png'}, 'boxes': [[1, 2, 9, 9]]},
    {**ROW, 'id': 'b', 'image': None, 'boxes': None},
  ]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'rows.parquet')
  first = list(open_source(str(tmp_path / 'rows.parquet')))
  assert first[0].boxes == ((1.0, 2.0, 9.0, 9.0),) and first[1].images == ()
  path = str(tmp_path / 'rows.array_record')
  pixels = dataclasses.replace(first[0], id='c', images=(picture(), np.asarray(picture())))
  write_array_record([*first, dataclasses.replace(pixels, boxes=None, box_format=None)], path)
  second = list(open_source(path))
  assert second[0] == first[0]
  assert (second[1].images, second[1].boxes) == ((), None)
  for source in second[2].images:
    np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(picture()))


# Examples


def test_examples_carry_sources_and_grids_not_pixels():
  record = Record('r1', 'what <image> <image>', 'dog', images=(png(16, 16), png(24, 16)))
  (example,) = make([record]).examples
  assert example.images == record.images
  assert example.sizes == ((16, 16), (24, 16)) and example.grids == ((1, 4, 4), (1, 4, 6))
  assert example.prompt_ids.count(PAD) == example.privileged_ids.count(PAD) == 4 + 6
  text = make([Record('r2', 'what', 'dog')]).examples[0]
  assert (text.images, text.grids, text.digest) == ((), (), '')
  patches, grids = example_images(example, PROCESSOR)
  assert [len(p) for p in patches] == [16, 24] and tuple(grids) == example.grids


def test_v4_too_long_prompts_go_with_their_images_and_are_counted():
  one, two = png(16, 16), png(40, 40)  # 4 and 25 tokens
  records = [
    Record('fits', 'what is this', '', images=(one,)),
    Record('many', '<image> <image> what', '', images=(two, two)),
    Record('hint', 'what is this', 'dog dog dog dog dog dog dog', images=(two,)),
    Record('text', 'what is this', ''),
  ]
  # A record takes 2 for its roles, 2 for each image and its words.
  kept = make(records, max_prompt_tokens=35)
  assert [e.record.id for e in kept.examples] == ['fits', 'text']
  assert kept.dropped == (1, 1, 0)
  for example in kept.examples:
    assert example.prompt_ids.count(PAD) == 4 * len(example.images)
  with pytest.raises(UserError, match='Record many: the prompt has 57 tokens'):
    make(records, max_prompt_tokens=35, on_too_long='error')
  assert len(make(records, max_prompt_tokens=57).examples) == 4


def test_an_image_longer_than_a_prompt_is_an_error():
  records = [Record('r1', 'what', '', images=(png(8, 8), png(40, 40)))]
  for how in ('drop', 'error'):
    with pytest.raises(UserError, match=r'Record r1, image 2: .*25 tokens .* is 24') as error:
      make(records, max_prompt_tokens=24, on_too_long=how)
    assert '\n' not in str(error.value)


def test_broken_images_are_found_when_the_data_are_opened():
  half = png(32, 32)[:-100]
  records = [Record(f'r{i}', 'what', '', images=(png(),)) for i in range(30)]
  records[17] = Record('r17', 'what', '', images=(half,))
  with pytest.raises(UserError, match=r'^Record r17: the image is broken, cut short'):
    make(records)
  # The head of a JPEG is whole: without the check it is found when it is read.
  jpeg = encoded(picture(64, 64), 'JPEG')
  lazy = renderer(check_pixels=False)
  records = [Record('r1', 'what', '', images=(jpeg[:-300],))]
  (example,) = tokenise(records, lazy, max_prompt_tokens=200).examples
  with pytest.raises(UserError, match=r'Record r1: the image is broken'):
    example_images(example, PROCESSOR)
  with pytest.raises(UserError, match=r'Record r1: .* limit of 100'):
    tokenise(records, renderer(pixel_limit=100), max_prompt_tokens=200)


def test_images_in_a_run_of_text():
  records = [Record('fine', 'what', ''), Record('r1', 'what', '', images=(png(),))]
  with pytest.raises(UserError, match=r'Record r1 has images and this run reads text only'):
    tokenise(records, Renderer(tokenizer()), max_prompt_tokens=200)


def test_boxes_are_held_against_their_image():
  def boxed(box, images=1, box_format='absolute'):
    record = Record('r1', 'what', '', images=(png(16, 8),) * images, boxes=(box,))
    return make([dataclasses.replace(record, box_format=box_format)])

  boxed((0.0, 0.0, 16.0, 8.0))
  boxed((0.0, 0.0, 900.0, 900.0), box_format='thousand')
  with pytest.raises(UserError, match=r'Record r1: box 1 .* outside its image of 16 x 8 pixels'):
    boxed((0.0, 0.0, 8.0, 16.0))
  with pytest.raises(UserError, match=r'Record r1: boxes belong to one image'):
    boxed((0.0, 0.0, 8.0, 8.0), images=2)


def test_contexts_are_made_of_the_kind(tmp_path):
  rows = [
    {'prompt': 'what', 'image': f'{i}.png', 'boxes': [[8, 4, 16, 8]], 'labels': ['dog'],
     'caption': 'cat', 'answer': '4', 'privileged_context': 'this'}
    for i in range(2)
  ]  # fmt: skip
  for i in range(2):
    (tmp_path / f'{i}.png').write_bytes(png(16, 8, i))
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))

  def contexts(**options):
    pipeline = make_pipeline(
      [(str(path), None)], RENDERER, batch_size=2, seed=0, max_prompt_tokens=200, **options
    )
    for example in pipeline.examples():
      same = example.privileged_ids == example.prompt_ids
      assert same == (not example.record.privileged_context)
    return {example.record.privileged_context for example in pipeline.examples()}

  box = '[\n{"bbox_2d": [500, 500, 1000, 1000]'
  assert contexts() == {'this'}
  assert contexts(privileged_kind='box') == {box + '}\n]'}
  assert contexts(privileged_kind='box+label') == {box + ', "label": "dog"}\n]'}
  assert contexts(privileged_kind='answer') == {'4'}
  assert contexts(privileged_kind='caption') == {'cat'}
  assert contexts(privileged_kind='none') == {''} == contexts(privileged='none')
  assert contexts(privileged='none', privileged_kind='box') == {''}
  thousand = '[\n{"bbox_2d": [8, 4, 16, 8]}\n]'
  assert contexts(privileged_kind='box', box_format='thousand') == {thousand}
  rows[1].pop('boxes')
  path.write_text('\n'.join(map(json.dumps, rows)))
  with pytest.raises(UserError, match=r'rows.jsonl line 2: there is no boxes'):
    contexts(privileged_kind='box')
  with pytest.raises(UserError, match='privileged_kind'):
    contexts(privileged_kind='bbox')


# Identity


def fingerprint(*images, boxes=None, inputs=RENDERER):
  records = [
    Record(f'r{i}', 'what', '', images=(image,), boxes=boxes) for i, image in enumerate(images)
  ]
  kept = tokenise(records, inputs, max_prompt_tokens=200)
  return Pipeline([(kept, None)], batch_size=1, seed=0).get_state()['fingerprint']


def test_the_fingerprint_knows_a_pixel(tmp_path):
  image = picture()
  other = image.copy()
  other.putpixel((5, 5), (0, 0, 0))
  paths = [tmp_path / 'a.png', tmp_path / 'b.png']
  for path, each in zip(paths, (image, other)):
    path.write_bytes(encoded(each))
  assert fingerprint(encoded(image)) == fingerprint(encoded(image.copy()))
  assert fingerprint(encoded(image)) != fingerprint(encoded(other))
  assert fingerprint(image) != fingerprint(other)
  # The bytes count, not where they lie: a run goes on from a copy of the data.
  assert fingerprint(str(paths[0])) == fingerprint(encoded(image)) != fingerprint(str(paths[1]))
  box = ((0.0, 0.0, 4.0, 4.0),)
  assert fingerprint(image) != fingerprint(image, boxes=box)
  assert fingerprint(png(8, 16)) != fingerprint(png(16, 8))
  assert fingerprint(png(), png(seed=1)) != fingerprint(png(seed=1), png())


def test_unchecked_images_are_known_by_name_and_size(tmp_path):
  lazy = renderer(check_pixels=False)
  (tmp_path / 'x').mkdir()
  data = encoded(picture(64, 64), 'JPEG')
  for name in ('a.jpg', 'b.jpg', 'x/a.jpg'):
    (tmp_path / name).write_bytes(data)
  a, b, moved = (
    fingerprint(str(tmp_path / name), inputs=lazy) for name in ('a.jpg', 'b.jpg', 'x/a.jpg')
  )
  assert a == moved != b
  (tmp_path / 'a.jpg').write_bytes(data + b'\0')
  assert fingerprint(str(tmp_path / 'a.jpg'), inputs=lazy) != a
  assert fingerprint(data, inputs=lazy) != fingerprint(data + b'\0', inputs=lazy)


def test_a_fingerprint_of_text_is_what_it_was():
  # Made before images were known: runs of then go on.
  kept = tokenise(
    [Record('r1', 'what is this', 'dog')], Renderer(word_tokenizer(WORDS)), max_prompt_tokens=200
  )
  state = Pipeline([(kept, None)], batch_size=1, seed=0).get_state()
  assert state['fingerprint'] == (
    '80334c20b1fa97ca0289032e4d34705943719a1d3259b0401306baa56cdaba08'
  )


def test_unknown_words_are_still_told(caplog):
  logging.getLogger('absl').propagate = True
  with caplog.at_level(logging.WARNING):
    make([Record('odd', 'zebra', '', images=(png(),))], name='mine')
  assert '1 of 1 records of mine' in caplog.text
