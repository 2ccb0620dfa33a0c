"""Tasks as data sources: one line of text names a whole data set."""

import subprocess
import sys

import pytest

from dopd_jax import tasks
from dopd_jax.data import DEFAULT_TEMPLATE, Renderer, make_pipeline, open_source
from dopd_jax.errors import UserError
from dopd_jax.tasks import plan_execute, words


def test_a_spec_gives_the_records_of_its_options():
  spec = 'plan_execute?size=7&seed=3&rho=0.5&hint=answer&ops=+-&split=test'
  wanted = plan_execute.make_records(7, 3, rho=0.5, hint='answer', ops='+-', split='test')
  assert tasks.load(spec) == wanted
  assert tasks.load('gsm_symbolic?size=2&seed=0') == tasks.make_records('gsm_symbolic', 2, 0)


@pytest.mark.parametrize(
  'spec, words',
  [
    ('plan_execute', 'size'),
    ('plan_execute?size=4', 'seed'),
    ('plan_execute?size=4.5&seed=0', 'size'),
    ('plan_execute?size=4&seed=0&roh=1', "did you mean 'rho'"),
    ('plan_execute?size=4&seed=0&rho=much', 'a number as rho'),
    ('plan_execute?size=4&seed=0&steps=3.5', 'a whole number as steps'),
    ('plan_execute?size=4&seed=0&hint=', 'no hint'),
    ('plan_excute?size=4&seed=0', 'plan_excute'),
  ],
)
def test_mistakes_in_a_spec(spec, words):
  with pytest.raises(UserError, match=words) as error:
    tasks.load(spec)
  assert '\n' not in str(error.value)


def test_from_spec_to_batches():
  pipeline = make_pipeline(
    [('task:plan_execute?size=40&seed=0&corrupt=0.5', 2), ('task:plan_execute?size=9&seed=1', 1)],
    Renderer(plan_execute.tokenizer()),
    batch_size=8,
    seed=0,
    max_prompt_tokens=40,
    max_completion_tokens=12,
    loaders={'task': tasks.load},
  )
  batches = list(pipeline)
  assert [len(b) for b in batches] == [8, 8, 8]
  assert pipeline.dropped.total == 0
  for batch in batches[:2]:
    for example in batch:
      assert len(example.prompt_ids) == 28 and len(example.privileged_ids) == 33
      assert len(example.completion_mask) == len(example.completion_ids)
      assert example.completion_mask[-1]
  assert batches[2][0].completion_mask is None
  assert open_source('task:plan_execute?size=3&seed=0', loaders={'task': tasks.load})[2].extra[
    'route'
  ]


def test_the_heading_of_the_toy_tokenizer_is_that_of_the_default_template():
  heading = DEFAULT_TEMPLATE.split('\n')[2]
  assert heading == words.REFERENCE


def test_words_differ():
  with pytest.raises(ValueError, match='differ'):
    words.word_tokenizer(['a', 'a'])


def test_tasks_load_neither_reasoning_gym_nor_transformers():
  script = (
    'import sys, dopd_jax.tasks as t; t.make_records("plan_execute", 1, 0); '
    'names = "reasoning_gym", "transformers", "jax", "sklearn", "PIL", "dopd_jax.data"; '
    'print([name for name in names if name in sys.modules])'
  )
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'
