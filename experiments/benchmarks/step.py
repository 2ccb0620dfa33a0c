"""Seconds of whole training steps through the real command's code: rollout, scores, update, log.

    python -m experiments.benchmarks.step --peer='.venv-trl/bin/python trl_opd.py'
    python -m experiments.benchmarks.step --method=dopd --hint=32

A random Qwen3 pair, student 4 layers x 256, teacher 8 x 512, tied heads, V 4,096; 32 prompts of 32
tokens, 128 new tokens each, Jensen-Shannon divergence to the teacher over the whole vocabulary (for
`dopd`: its own four regimes). With `--hint` the guides read so many tokens more. A stop token comes
about once in 4,096 tokens, as the weights are random: `tokens` says how many there were.
"""

import json
import os
import statistics
import tempfile

import jax
import numpy as np
from absl import app, flags

from dopd_jax import config as configs
from dopd_jax import models, train
from dopd_jax.tasks.words import word_tokenizer
from experiments.benchmarks import harness

_METHOD = flags.DEFINE_string('method', 'opd', 'Of dopd_jax.objectives.METHODS.')
_HINT = flags.DEFINE_integer('hint', 0, 'Tokens of the hint; the teacher of opd reads it too.')
_BATCH = flags.DEFINE_integer('batch', 32, 'Prompts, one completion each.')
_PROMPT = flags.DEFINE_integer('prompt', 32, 'Tokens of a prompt.')
_NEW = flags.DEFINE_integer('new', 128, 'Tokens of a completion.')
_STEPS = flags.DEFINE_integer(
  'steps', 10, 'Training steps; the first three and the last are not counted.'
)
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'Of activations.')
_TILE = flags.DEFINE_integer('head_tile', 256, 'Tokens whose logits exist at once; 0: automatic.')
_REMAT = flags.DEFINE_bool('remat', True, 'Compute activations again in the backward pass.')
_LAYERS = flags.DEFINE_list('layers', ['4', '8'], 'Of student and teacher.')
_WIDTHS = flags.DEFINE_list('widths', ['256', '512'], 'Of student and teacher; heads are 64 wide.')
_VOCAB = flags.DEFINE_integer('vocab', 4096, 'Ids of the tokenizer and rows of both tables.')


def make_config(folder):
  """Writes models and data, and returns the config that trains on them."""
  tokenizer = word_tokenizer([])
  tokenizer = word_tokenizer([f'w{i}' for i in range(_VOCAB.value - len(tokenizer))])
  c = configs.default(_METHOD.value)
  for i, policy in enumerate((c.student, c.teacher)):
    shape = harness.qwen3(
      int(_LAYERS.value[i]),
      int(_WIDTHS.value[i]),
      _VOCAB.value,
      eos_token_ids=(tokenizer.eos_token_id,),
      pad_token_id=tokenizer.pad_token_id,
    )
    policy.path = os.path.join(folder, str(i))
    params = jax.jit(models.build(shape).init)(jax.random.key(i))
    models.save(policy.path, shape, params, tokenizer=tokenizer)
  rng = np.random.default_rng(0)
  words = lambda n: ' '.join(f'w{i}' for i in rng.integers(0, _VOCAB.value // 2, n))
  c.data.train = os.path.join(folder, 'data.jsonl')
  with open(c.data.train, 'w') as file:
    for i in range(_BATCH.value * _STEPS.value):
      row = {'id': str(i), 'prompt': words(_PROMPT.value - 2)}  # two roles
      row['privileged_context'] = words(max(_HINT.value - 1, 1))  # and a heading
      file.write(json.dumps(row) + '\n')
  if _METHOD.value == 'opd':
    c.objective.divergence, c.objective.region = 'js', 'full'
    c.objective.teacher_context = 'privileged' if _HINT.value else 'plain'
  c.data.max_prompt_tokens = _PROMPT.value + _HINT.value + 8
  c.data.prompt_bucket = _PROMPT.value
  c.rollout.prompts, c.rollout.samples = _BATCH.value, 1
  c.rollout.max_new_tokens = _NEW.value
  c.microbatch = _BATCH.value
  c.head_tile = _TILE.value
  c.compute_dtype = _DTYPE.value
  c.remat = _REMAT.value
  c.steps = _STEPS.value
  c.checkpoint.every, c.checkpoint.best = _STEPS.value, ''
  c.optimizer.learning_rate = 1e-4
  c.log.tensorboard = False
  return configs.validate(c)


def main(argv):
  """Trains for some steps and prints the line."""
  del argv
  with tempfile.TemporaryDirectory() as folder:
    config = make_config(folder)
    workdir = os.path.join(folder, 'run')
    with harness.Memory() as memory:
      train.train(config, workdir)
    with open(os.path.join(workdir, 'metrics.jsonl')) as file:
      rows = [json.loads(line) for line in file][3 - _STEPS.value : -1]
  seconds = [row['time/step_seconds'] for row in rows]
  length = statistics.mean(row['train/completion_length'] for row in rows)
  median = statistics.median(seconds)
  ours = {
    'median_s': round(median, 4),
    'fastest_s': round(min(seconds), 4),
    'slowest_s': round(max(seconds), 4),
    'tokens': round(length * _BATCH.value),
    'tokens_per_s': round(length * _BATCH.value / median),
    'peak_gib_over_start': memory.gib,
  }
  harness.report('step', ours)


if __name__ == '__main__':
  app.run(main)
