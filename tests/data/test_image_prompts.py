"""Prompts with images: each image at its place, as many placeholders as features, or a sentence."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from dopd_jax.data import ImageInputs, ImageProcessor, Record, Renderer
from dopd_jax.errors import UserError
from dopd_jax.tasks.words import REFERENCE
from tests.assets import QWEN3_TOKENIZER, have_qwen3_tokenizer
from tests.data.pictures import PROCESSOR, encoded, image_inputs, picture, png, renderer, tokenizer

RENDERER = renderer()
TOKENIZER = RENDERER.tokenizer
PAD = RENDERER.images.image_token_id
VISION = '<|vision_start|> {} <|vision_end|>'
# 4 and 6 tokens.
TWO = (png(16, 16), png(24, 16, 1))


def image(tokens):
  return VISION.format(' '.join(['<|image_pad|>'] * tokens))


def ids(text):
  return TOKENIZER(text, add_special_tokens=False)['input_ids']


def user(text):
  return ids(f'<|user|> {text} <|assistant|>')


def record(prompt='what is this', images=TWO[:1], context='', **columns):
  return Record('r1', prompt, context, images=tuple(images), **columns)


PART = {'type': 'image'}


def text(words):
  return {'type': 'text', 'text': words}


def test_images_stand_in_front_of_the_text():
  assert RENDERER.plain(record()) == user(f'{image(4)} what is this')
  assert RENDERER.plain(record(images=TWO)) == user(f'{image(4)} {image(6)} what is this')
  assert RENDERER.plain(record(images=())) == user('what is this')


@pytest.mark.parametrize(
  'prompt',
  [
    'what <image> and <image> is this',
    [{'role': 'user', 'content': 'what <image> and <image> is this'}],
    [{'role': 'user', 'content': [text('what '), PART, text('and '), PART, text('is this')]}],
  ],
)
def test_images_stand_where_the_prompt_says(prompt):
  wanted = user(f'what {image(4)} and {image(6)} is this')
  assert RENDERER.plain(record(prompt, TWO)) == wanted
  assert RENDERER.plain(record(prompt, TWO[::-1])) != wanted


def test_images_of_several_turns():
  chat = [
    {'role': 'user', 'content': 'what is this'},
    {'role': 'assistant', 'content': 'dog'},
    {'role': 'user', 'content': 'and this'},
  ]
  rest = '<|assistant|> dog <|im_end|> <|user|> {} <|assistant|>'
  assert RENDERER.plain(record(chat)) == ids(
    f'<|user|> {image(4)} what is this ' + rest.format('and this')
  )
  chat[2]['content'] = 'and this <image>'
  assert RENDERER.plain(record(chat)) == ids(
    '<|user|> what is this ' + rest.format(f'and this {image(4)}')
  )


def test_the_privileged_prompt_has_the_same_images_at_the_same_places():
  for prompt in ('what is this', 'what <image> is this', [{'role': 'user', 'content': [PART]}]):
    r = record(prompt, context='dog')
    plain, privileged = RENDERER.plain(r), RENDERER.privileged(r)
    end = len(ids('<|assistant|>'))
    assert privileged == plain[:-end] + ids(f'{REFERENCE} dog <|assistant|>')
    assert RENDERER.privileged(record(prompt)) == plain
  # Neighbouring texts are one part: a template may put something between parts.
  assert RENDERER._privileged_prompt(record('what', context='dog'))[0]['content'] == [
    PART,
    text(f'what\n\n{REFERENCE}\ndog'),
  ]
  # A marker in a context is only text.
  marked = RENDERER.privileged(record(context='dog <image>'))
  assert marked == user(f'{image(4)} what is this {REFERENCE} dog <image>')


def test_a_marker_is_only_text_without_images():
  assert RENDERER.plain(record('what <image>', ())) == user('what <image>')
  text_only = Renderer(tokenizer())
  assert text_only.plain(record('what <image>', ())) == user('what <image>')


def test_rendering_leaves_the_record_alone():
  chat = [{'role': 'user', 'content': 'what <image> is this'}]
  RENDERER.privileged(record(chat, context='dog'))
  assert chat == [{'role': 'user', 'content': 'what <image> is this'}]


def test_batches_with_and_without_images_equal_single_records():
  records = [
    record(prompt, images, context)
    for prompt, images, context in itertools.product(
      ('what', 'this'), ((), TWO, TWO[1:]), ('', 'dog')
    )
  ]
  assert RENDERER.plain_batch(records) == [RENDERER.plain(r) for r in records]
  assert RENDERER.privileged_batch(records) == [RENDERER.privileged(r) for r in records]


def test_given_grids_are_those_of_the_placeholders():
  r = record(images=TWO)
  (prompt,) = RENDERER.plain_batch([r], grids=[[(1, 2, 2), (1, 2, 20)]])
  assert prompt == user(f'{image(1)} {image(10)} what is this')
  with pytest.raises(ValueError, match='grid'):
    RENDERER.plain_batch([r], grids=[[(1, 2, 2)]])
  # They are given so that no image is opened.
  gone = record(images=('gone.png',))
  (prompt,) = RENDERER.plain_batch([gone], grids=[[(1, 2, 2)]])
  assert prompt == user(f'{image(1)} what is this')
  with pytest.raises(UserError, match=r'Record r1: the image'):
    RENDERER.plain(gone)


@given(
  st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=4),
  st.permutations(['what', 'dog', 'cat', 'is']),
  st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_placeholders_are_features(sizes, words, style):
  images = [picture(*size) for size in sizes]
  places = [*words[: len(images)]]
  prompt = {
    0: ' '.join(words),
    1: ' '.join(f'{word} <image>' for word in places) or 'what',
    2: [{'role': 'user', 'content': [p for w in places for p in (text(w + ' '), PART)] or 'what'}],
  }[style]
  r = record(prompt, images, 'cat')
  tokens = [len(PROCESSOR.patches(i)) // PROCESSOR.merge_size**2 for i in images]
  for prompt_ids in (RENDERER.plain(r), RENDERER.privileged(r)):
    runs = [
      len(list(run)) for is_pad, run in itertools.groupby(i == PAD for i in prompt_ids) if is_pad
    ]
    runs_by_token = [len(list(g)) for key, g in itertools.groupby(prompt_ids) if key == PAD]
    assert runs == runs_by_token == tokens


@pytest.mark.parametrize(
  'prompt, images, words',
  [
    ('what <image> <image>', 1, 'the prompt has 2 places'),
    ('what <image>', 2, 'the prompt has 1 places .* 2 images'),
    ([{'role': 'user', 'content': [PART, text('what')]}], 0, 'the prompt has 1 places .* 0 images'),
    ([{'role': 'user', 'content': [PART, PART]}], 1, 'the prompt has 2 places'),
    ('what <|image_pad|>', 1, '2 image tokens for 1 images: take image tokens out'),
    ('what <|image_pad|>', 0, '1 image tokens for 0 images'),
  ],
)
def test_more_or_fewer_places_than_images(prompt, images, words):
  with pytest.raises(UserError, match=f'^Record r1: .*{words}'.replace('|', r'\|')) as error:
    RENDERER.plain(record(prompt, TWO[:images]))
  assert '\n' not in str(error.value)


def test_image_tokens_in_a_context_or_completion():
  with pytest.raises(UserError, match=r'Record r1: .*2 image tokens for 1'):
    RENDERER.privileged(record(context='<|image_pad|>'))
  with pytest.raises(UserError, match=r'Record r1: the completion has an image token'):
    RENDERER.completion_batch([Record('fine', 'x'), record(completion='dog <|image_pad|>')])
  fine = Renderer(tokenizer()).completion(Record('r', 'x', completion='<|image_pad|>'))
  assert fine == [PAD, TOKENIZER.eos_token_id]


def test_runs_that_cannot_read_images():
  with pytest.raises(UserError, match=r'Record r1 has images and this run reads text only'):
    Renderer(tokenizer()).plain_batch([Record('fine', 'what'), record()])
  # A text model's template writes nothing for an image.
  deaf = tokenizer()
  deaf.chat_template = (
    "{% for m in messages %}{{ m['content'] if m['content'] is string }}{% endfor %}"
  )
  with pytest.raises(
    UserError, match=r'Record r1: .*0 image tokens for 1 images: the chat template'
  ):
    Renderer(deaf, images=image_inputs()).plain(record())
  bare = tokenizer()
  bare.chat_template = None
  with pytest.raises(UserError, match=r'Record r1: .*no chat template'):
    Renderer(bare, images=image_inputs()).plain(record())
  assert Renderer(bare, images=image_inputs()).plain(record(images=())) == ids('what is this')


def test_a_tokenizer_without_image_tokens():
  for token in (len(TOKENIZER), -1):
    with pytest.raises(UserError, match='lacks the image token'):
      Renderer(tokenizer(), images=ImageInputs(PROCESSOR, token))


# Qwen3-VL's template for the contents of a message, as published.
QWEN3_VL_TEMPLATE = (
  "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
  '{%- if message.content is string %}{{- message.content }}{%- else %}'
  '{%- for content in message.content %}'
  "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
  "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
  "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
  "{{- '<|im_end|>\\n' }}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.mark.skipif(
  not have_qwen3_tokenizer(), reason=f'the Qwen3 tokenizer is not in {QWEN3_TOKENIZER}'
)
def test_qwen3_vl_ids_are_those_of_its_processor():
  qwen3 = AutoTokenizer.from_pretrained(QWEN3_TOKENIZER)
  qwen3.chat_template = QWEN3_VL_TEMPLATE
  processor = ImageProcessor(min_pixels=1024)
  mine = Renderer(qwen3, images=ImageInputs(processor, 151655))
  images = [encoded(picture(320, 320)), picture(70, 33)]
  r = record('What differs?\nSay.', images, '[\n{"bbox_2d": [1, 2, 3, 4]}\n]')

  # Theirs needs torchvision for videos: only its way with an image token is taken.
  theirs = object.__new__(Qwen3VLProcessor)
  theirs.image_token = '<|image_pad|>'
  theirs.image_processor = processor._wrapped
  grids = processor._wrapped.preprocess([picture(320, 320), picture(70, 33)], return_tensors='np')
  for context, prompt_ids in (('', mine.plain(r)), (r.privileged_context, mine.privileged(r))):
    body = r.prompt if not context else f'{r.prompt}\n\n{REFERENCE}\n{context}'
    content = [PART, PART, text(body)]
    rendered = qwen3.apply_chat_template(
      [{'role': 'user', 'content': content}], tokenize=False, add_generation_prompt=True
    )
    for i in range(2):
      expanded = theirs.replace_image_token(grids, i).replace('image_pad', 'done')
      rendered = rendered.replace('<|image_pad|>', expanded, 1)
    rendered = rendered.replace('<|done|>', '<|image_pad|>')
    assert prompt_ids == qwen3(rendered, add_special_tokens=False)['input_ids']
    assert prompt_ids.count(151655) == 100 + 2


def test_a_context_can_be_put_in_later():
  # Hints made during a run are rendered with the grids that the example carries.
  r = dataclasses.replace(record(), privileged_context='cat')
  assert RENDERER.privileged_batch([r], grids=[((1, 4, 4),)])[0] == RENDERER.privileged(r)
