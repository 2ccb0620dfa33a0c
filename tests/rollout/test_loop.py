"""The decode loop as XLA compiles it: the cache is written in place, and the head is read as it is.

A copy of the cache in the body of a loop costs as much as all the reading of attention, each step
and layer, and nothing in the numbers shows it. So the optimised HLO is read.
"""

import re

import jax
import numpy as np
import pytest

from dopd_jax.rollout import Sampling
from dopd_jax.rollout.sampler import make_generate
from tests.models import tiny
from tests.rollout import toy

N, M = 40, 2


@pytest.fixture(autouse=True)
def optimised():
  """The other tests compile without optimisation, and that is another program."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


def compiled(kind='qwen3-tied', **settings):
  model, params = tiny.model(kind)
  tokens, valid = toy.pad_prompts([[1] * 7, [2] * 3], 8, pad_id=0)
  sampling = Sampling(max_new_tokens=N, num_samples=M, **settings)
  generate = make_generate(model, sampling, stop_ids=[3], pad_id=0, live_vocab=tiny.V)
  arguments = (params, tokens, valid, jax.random.key(0), np.arange(2))
  return model.config, jax.jit(generate).lower(*arguments).compile().as_text()


def computations(text):
  """{name: lines} of each computation of a module."""
  found, lines = {}, []
  for line in text.splitlines():
    head = re.match(r'(?:ENTRY )?%([\w.-]+) \(.*\{$', line)
    if head:
      lines = found.setdefault(head[1], [])
    lines.append(line)
  return found


def in_loops(text):
  """Lines of all bodies of while loops, with all that they call."""
  every = computations(text)
  called = {
    name: {x for line in lines[1:] for x in re.findall(r'%([\w.-]+)', line) if x in every}
    for name, lines in every.items()
  }
  waiting = re.findall(r'body=%([\w.-]+)', text)
  seen = set()
  while waiting:
    name = waiting.pop()
    if name not in seen:
      seen.add(name)
      waiting.extend(called[name])
  return [line for name in sorted(seen) for line in every[name]]


def operations(lines, shape, *names):
  """Lines whose result has the shape and whose operation is one of those named."""
  result = rf'= \w+\[{",".join(map(str, shape))}\]\S* ({"|".join(names)})\('
  return [line for line in lines if re.search(result, line)]


def cache_shape(config, rows, columns):
  heads = config.num_key_value_heads
  return (config.num_hidden_layers, rows, columns, heads, config.head_dim)


@pytest.mark.parametrize('slots', [0, 3])
@pytest.mark.parametrize('kv_cache', ['compute', 'int8'])
def test_the_cache_is_written_in_place(kv_cache, slots):
  config, text = compiled(kv_cache=kv_cache, slots=slots)
  shape, lines = cache_shape(config, slots or 2 * M, 8 + N - 1), in_loops(text)
  assert len(operations(lines, shape, 'dynamic-update-slice')) >= 2  # keys and values
  assert not operations(lines, shape, 'copy', 'scatter', 'transpose', 'select', 'concatenate')


@pytest.mark.parametrize('kind, slots', [('qwen3-tied', 0), ('qwen3-untied', 0), ('qwen3-tied', 3)])
def test_the_head_is_read_as_it_lies(kind, slots):
  config, text = compiled(kind, slots=slots)
  V, D = config.vocab_size, config.hidden_size
  assert re.search(rf'\[{V},{D}\]\S* (get-tuple-element|parameter)\(', '\n'.join(in_loops(text)))
  for shape in ((V, D), (D, V)):
    assert not operations(text.splitlines(), shape, 'copy', 'transpose')
