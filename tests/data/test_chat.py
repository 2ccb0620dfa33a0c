"""One tokenizer and one generation state for both renderings; Qwen3's own template if present."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dopd_jax.data import DEFAULT_TEMPLATE, Record, Renderer
from dopd_jax.errors import UserError
from tests.assets import QWEN3_TOKENIZER, have_qwen3_tokenizer

BOS, EOS = '<s>', '</s>'
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} "
  "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
  '{% if add_generation_prompt %}[assistant]{% endif %}'
)


def byte_tokenizer(chat_template=CHAT_TEMPLATE):
  """A byte-level tokenizer that, asked for special tokens, adds BOS and EOS like Llama's."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  ids = {character: i for i, character in enumerate([BOS, EOS, *alphabet])}
  tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.add_special_tokens([BOS, EOS])
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'{BOS} $A {EOS}', special_tokens=[(BOS, 0), (EOS, 1)]
  )
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
  fast.chat_template = chat_template
  return fast


TOKENIZER = byte_tokenizer()
RENDERER = Renderer(TOKENIZER)
BARE = Renderer(byte_tokenizer(None))


def ids(text, tokenizer=TOKENIZER):
  return tokenizer(text, add_special_tokens=False)['input_ids']


def record(prompt='Why?', context='Because.', **columns):
  return Record('r1', prompt, context, **columns)


def test_text_is_one_user_message():
  assert RENDERER.plain(record()) == ids(f'{BOS}[user] Why? [assistant]')


def test_the_privileged_section_is_as_specified():
  section = 'Why?\n\nReference for this problem (do not mention it in your answer):\nBecause.'
  assert RENDERER.privileged(record()) == ids(f'{BOS}[user] {section} [assistant]')


def test_the_context_goes_into_the_last_user_message():
  chat = [
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Hello'},
    {'role': 'user', 'content': 'Why?'},
  ]
  head = f'{BOS}[user] Hi [assistant] Hello [user] '
  renderer = Renderer(TOKENIZER, '{prompt} ({context})')
  assert renderer.plain(record(chat)) == ids(f'{head}Why? [assistant]')
  assert renderer.privileged(record(chat)) == ids(f'{head}Why? (Because.) [assistant]')
  assert chat[-1]['content'] == 'Why?'  # the record is left alone


@pytest.mark.parametrize('context', [None, '', ' \n'])
@pytest.mark.parametrize('renderer', [RENDERER, BARE], ids=['chat', 'bare'])
def test_an_empty_context_is_exactly_the_plain_prompt(renderer, context):
  r = record(context=context)
  assert renderer.privileged(r) == renderer.plain(r)


def test_one_bos_and_no_eos():
  for renderer in (RENDERER, BARE):
    for prompt in (renderer.plain(record()), renderer.privileged(record())):
      assert prompt.count(0) == 1 and prompt[0] == 0
      assert 1 not in prompt


def test_without_a_template_text_is_encoded_as_it_is():
  assert BARE.plain(record('a {b}\n')) == [0, *ids('a {b}\n')]
  assert BARE.plain(record(f'{BOS}a')) == [0, *ids('a')]
  assert BARE.plain(record([{'role': 'user', 'content': 'a'}])) == [0, *ids('a')]
  chat = [{'role': 'system', 'content': 'x'}, {'role': 'user', 'content': 'a'}]
  with pytest.raises(UserError, match=r'r1.*no chat template'):
    BARE.plain(record(chat))


@pytest.mark.parametrize('text', ['4', f'4{EOS}', f'4{EOS}{EOS}', '', EOS])
def test_a_completion_ends_with_exactly_one_stop_token(text):
  body = ids('4') if '4' in text else []
  assert RENDERER.completion(record(completion=text)) == [*body, 1]


def test_no_completion_and_no_stop_token():
  assert RENDERER.completion(record()) is None
  assert Renderer(TOKENIZER, stop_id=9).completion(record(completion='4')) == [*ids('4'), 9]
  tokenizer = byte_tokenizer()
  tokenizer.eos_token = None
  with pytest.raises(UserError, match='no eos token'):
    Renderer(tokenizer).completion(record(completion='4'))


@given(st.text(), st.text())
@settings(max_examples=100, deadline=None)
def test_braces_and_placeholders_in_content_are_text(prompt, context):
  for extra in ('', '{context}', '{prompt}', '{0}', '{', '}}'):
    p, c = prompt + extra, context + extra
    pieces = DEFAULT_TEMPLATE.split('{prompt}')[1].split('{context}')
    wanted = p + pieces[0] + c + pieces[1] if c.strip() else p
    assert BARE._privileged_prompt(record(p, c)) == wanted


def test_batches_equal_single_records():
  records = [record(f'{i} is?', 'x' * (i % 3), completion='y' * i) for i in range(5)]
  for one, many in (
    (RENDERER.plain, RENDERER.plain_batch),
    (RENDERER.privileged, RENDERER.privileged_batch),
    (RENDERER.completion, RENDERER.completion_batch),
    (BARE.plain, BARE.plain_batch),
  ):
    assert many(records) == [one(r) for r in records]


def test_a_template_needs_both_placeholders():
  for template in ('{prompt}', '{context}', '{prompt} {hint}'):
    with pytest.raises(UserError, match='privileged_template'):
      Renderer(TOKENIZER, template)
  assert Renderer(TOKENIZER, r'{prompt} \boxed{x} {context}').privileged(record('a', 'b')) == ids(
    f'{BOS}[user] a \\boxed{{x}} b [assistant]'
  )


def test_a_template_that_refuses_roles_names_the_record():
  chat = [{'role': 'user', 'content': 'a'}, {'role': 'tool', 'content': 'b'}]
  good = Record('fine', 'Why?')
  with pytest.raises(UserError, match=r'Record r1: .*no tools here'):
    RENDERER.plain_batch([good, record(chat)])


@pytest.fixture(scope='module')
def qwen3():
  if not have_qwen3_tokenizer():
    pytest.skip(f'the Qwen3 tokenizer is not in {QWEN3_TOKENIZER}: python tests/assets.py')
  return AutoTokenizer.from_pretrained(QWEN3_TOKENIZER)


def hf_ids(tokenizer, content, **options):
  chat = [{'role': 'user', 'content': content}]
  rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options)
  return rendered['input_ids']


def test_qwen3_without_thinking_equals_the_template(qwen3):
  plain = Renderer(qwen3).plain(record('Hello {x}\n中'))
  assert plain == hf_ids(qwen3, 'Hello {x}\n中', enable_thinking=False)
  # <think>, two real line breaks, </think>, two more: not a backslash and an n.
  assert plain[-4:] == [151667, 271, 151668, 271]
  assert qwen3.decode(plain[-4:]) == '<think>\n\n</think>\n\n'


def test_qwen3_with_thinking_leaves_it_open(qwen3):
  plain = Renderer(qwen3, thinking=True).plain(record())
  assert plain == hf_ids(qwen3, 'Why?', enable_thinking=True)
  assert 151667 not in plain


@pytest.mark.parametrize('thinking', [False, True])
def test_qwen3_renders_both_prompts_in_one_generation_state(qwen3, thinking):
  renderer = Renderer(qwen3, thinking=thinking)
  plain, privileged = renderer.plain(record()), renderer.privileged(record())
  end = len(plain) - max(i for i, token in enumerate(plain) if token == 151645)
  assert plain[-end:] == privileged[-end:]
  assert plain[:3] == privileged[:3]
  assert len(privileged) > len(plain)
  assert renderer.privileged(record(context='')) == plain


def test_qwen3_completion_has_one_stop_token(qwen3):
  for text in ('It is 4.', 'It is 4.<|im_end|>'):
    done = Renderer(qwen3).completion(record(completion=text))
    assert done == [*ids('It is 4.', qwen3), 151645]


def test_qwen3_keeps_special_tokens_of_a_prompt(qwen3):
  plain = Renderer(qwen3).plain(record('a<|vision_start|>b'))
  assert 151652 in plain
