"""A rollout batch before it is scored: who wrote it, rewards, siblings."""

import dataclasses

import jax
import numpy as np
import pytest

from dopd_jax import collect, dataset, evaluation, policies, sharding
from dopd_jax import config as configs
from dopd_jax.data import Example, Record
from tests import pairs


@pytest.fixture(autouse=True)
def mesh():
  """What a run has around it; it must not outlive the test."""
  with jax.set_mesh(sharding.make_mesh(1, -1, 1)):
    yield


def world(method, **changes):
  config = configs.validate(pairs.config(method, **changes))
  objective = config.objective.build()
  mesh = sharding.make_mesh(1, -1, 1)
  pair = policies.load_pair(config, mesh, objective.weights)
  pipeline = dataset.open_pipeline(config, pair, objective)
  return config, pair, pipeline, collect.make_collect(config, pair, objective, mesh)


def example(text='q'):
  return Example(0, Record('r', text), [1, 2], [1, 2])


def test_a_sibling_is_another_right_completion_of_the_same_prompt():
  texts = [f't{i}' for i in range(12)]
  right = np.array([1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0], bool)
  examples = [example(f'q{i // 4}') for i in range(12)]
  hinted, has = collect.with_siblings(examples, texts, right, 4)
  hints = [e.record.privileged_context for e in hinted]
  # Row 4 is right itself and alone: it may not be its own hint.
  assert hints == ['t2', 't2', 't0', 't0', '', 't4', 't4', 't4', '', '', '', '']
  assert has.tolist() == [bool(h) for h in hints]
  assert [e.record.prompt for e in hinted] == [e.record.prompt for e in examples]


def test_a_blank_completion_is_no_hint():
  hinted, has = collect.with_siblings([example()] * 2, [' ', 'x'], np.array([True, True]), 2)
  assert [e.record.privileged_context for e in hinted] == ['x', ''] and has.tolist() == [
    True,
    False,
  ]


def test_a_hint_over_the_limit_is_left_out():
  class Renderer:
    def privileged_batch(self, records):
      return [[1] * (3 if r.privileged_context == 'long' else 2) for r in records]

  rows = [
    dataclasses.replace(example(), record=Record('r', 'q', privileged_context=hint))
    for hint in ('long', 'ok')
  ]
  chosen, has = collect.rendered(Renderer(), rows, np.array([True, True]), limit=2)
  assert has.tolist() == [False, True]
  assert [len(e.privileged_ids) for e in chosen] == [2, 2]


def test_sdpo_keeps_ids_and_masks_rows_without_a_sibling(monkeypatch):
  """Rewards by chance: what matters here is which rows then carry loss and what they read."""
  reward = np.array([1, 0, 0, 0] * 8, float)
  monkeypatch.setattr(evaluation, 'rewards', lambda examples, texts: reward)
  config, pair, pipeline, go = world('sdpo', rollout__samples=4, rollout__prompts=8)
  examples = next(pipeline)
  got = go(pair.student.params, examples, 1)
  _, _, _, plain = world('opd', rollout__samples=4, rollout__prompts=8)
  np.testing.assert_array_equal(
    got.rollout.tokens, plain(pair.student.params, examples, 1).rollout.tokens
  )
  np.testing.assert_array_equal(got.batch.tokens, got.rollout.tokens)
  texts = evaluation.decode(
    pair.tokenizer, np.asarray(got.rollout.tokens), np.asarray(got.rollout.mask)
  )
  renderer = dataset.renderer(config, pair)
  prompt = got.batch.prompts['sibling']
  for row, supervised in enumerate(np.asarray(got.batch.supervised)):
    hint = texts[row - row % 4] if row % 4 else ''
    assert supervised.any() == bool(hint.strip())
    record = dataclasses.replace(got.examples[row].record, privileged_context=hint)
    length = int(prompt.length[row])
    assert prompt.tokens[row, :length].tolist() == renderer.privileged(record)
  np.testing.assert_array_equal(got.batch.reward, reward)


def test_gkds_coin_is_a_function_of_seed_and_step():
  _, pair, pipeline, go = world('gkd')
  examples = next(pipeline)
  kinds = [go(pair.student.params, examples, step).sampled for step in range(1, 13)]
  assert {True, False} == set(kinds)
  _, _, _, again = world('gkd')
  assert [again(pair.student.params, examples, s).sampled for s in (12, 5, 1)] == [
    kinds[11],
    kinds[4],
    kinds[0],
  ]
  fixed = next(i for i, sampled in enumerate(kinds, 1) if not sampled)
  got = go(pair.student.params, examples, fixed)
  for row, e in enumerate(examples):
    assert got.batch.tokens[row][got.batch.mask[row]].tolist() == e.completion_ids
  for share, want in ((0.0, {False}), (1.0, {True})):
    _, _, _, one = world('gkd', objective__on_policy_share=share)
    assert {one(pair.student.params, examples, s).sampled for s in range(1, 5)} == want
