"""A tiny random pair as Hugging Face directories, and a config that trains it: seconds on a CPU."""

import functools
import os
import tempfile

import jax

from dopd_jax import config as configs
from dopd_jax import models, tasks


def architecture(layers, width, vocab=None, heads=2):
  tokenizer = tasks.plan_execute.tokenizer()
  return models.DecoderConfig(
    vocab_size=vocab or len(tokenizer),
    hidden_size=width,
    intermediate_size=2 * width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.2,
    max_position_embeddings=128,
    eos_token_ids=(tokenizer.eos_token_id,),
    pad_token_id=tokenizer.pad_token_id,
  )


def write(directory, config, seed, tokenizer=None):
  params = models.build(config).init(jax.random.key(seed))
  tokenizer = tokenizer or tasks.plan_execute.tokenizer()
  models.save(directory, config, params, tokenizer=tokenizer)
  return str(directory)


@functools.cache
def pair():
  """(student directory, teacher directory); the teacher's table is padded beyond the tokenizer."""
  root = tempfile.mkdtemp(prefix='dopd_jax_pair_')
  student = write(os.path.join(root, 'student'), architecture(1, 16), 0)
  teacher = write(os.path.join(root, 'teacher'), architecture(2, 24, vocab=64), 1)
  return student, teacher


def config(method='dopd', **changes):
  """4 steps, 16 rows a step, 8 a micro-batch; in names of `changes` `__` is the dot."""
  c = configs.default(method)
  c.student.path, c.teacher.path = pair()
  c.data.train = 'task:plan_execute?size=24&seed=0&steps=2&definitions=4'
  c.data.eval = 'task:plan_execute?size=8&seed=1&steps=2&definitions=4&split=test'
  c.data.max_prompt_tokens = 32
  c.data.prompt_bucket = 32
  c.rollout.prompts, c.rollout.samples, c.rollout.max_new_tokens = 8, 2, 6
  c.optimizer.learning_rate = 1e-2
  c.microbatch = 8
  c.steps = 4
  c.checkpoint.every = 2
  c.evaluation.every = 2
  c.mesh.fsdp = -1
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return c
