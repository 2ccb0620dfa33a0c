"""A step whose shapes were met before compiles nothing."""

import json

import jax
import pytest

from dopd_jax import config as configs
from dopd_jax import train
from tests import pairs


@pytest.fixture
def compilations():
  """A list that grows by one whenever XLA compiles, or a compiled program is read from a cache."""
  found = []

  def listen(event, *_, **__):
    if event == '/jax/core/compile/backend_compile_duration':
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


def test_known_shapes_compile_nothing(compilations, monkeypatch, tmp_path):
  """Prompts of two buckets, hints of two: up to four shapes of a batch, met in any order."""
  rows = []
  for i in range(48):
    long_prompt, long_hint = i % 16 == 0, i % 24 == 5
    words = 'x0 = 3 + 4 ' * (2 if long_prompt else 1)
    hint = 'x1 = 2 ' * (6 if long_hint else 1)
    rows.append({'id': str(i), 'prompt': words + 'x0 ?', 'privileged_context': hint})
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  seen = []  # (shapes of the step's batch, compilations before it)
  take = train.Ahead.take

  def watched(*args):
    before = len(compilations)
    found = take(*args)
    shapes = {name: p.tokens.shape for name, p in found.batch.prompts.items()}
    seen.append((tuple(sorted(shapes.items())), before))
    return found

  monkeypatch.setattr(train.Ahead, 'take', watched)
  config = pairs.config(
    data__train=str(data), data__eval='', data__prompt_bucket=8, data__max_prompt_tokens=64,
    rollout__prompts=8, rollout__samples=2, steps=20, checkpoint__every=20, checkpoint__best='',
    evaluation__every=0,
  )  # fmt: skip
  train.train(configs.validate(config), str(tmp_path / 'run'))
  shapes = [shape for shape, _ in seen]
  assert 2 <= len(set(shapes)) <= 4, set(shapes)
  assert seen[-1][1] > seen[0][1]  # the first steps did compile
  for step in range(1, len(seen) - 1):
    (shape, before), (_, after) = seen[step : step + 2]
    if shape in shapes[:step]:
      assert before == after, f'step {step + 1} compiled {after - before} programs again'
