"""A tiny random pair that sees, as Hugging Face directories, and a config that trains it."""

import functools
import os
import tempfile

from dopd_jax import config as configs
from dopd_jax import models, policies, tasks
from dopd_jax.data import ImageProcessor
from tests import pairs


def architecture(layers, width, vision_width, deepstack=(0,)):
  tokenizer = tasks.digits.tokenizer()
  return models.DecoderConfig(
    vocab_size=len(tokenizer),
    hidden_size=width,
    intermediate_size=2 * width,
    num_hidden_layers=layers,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.2,
    max_position_embeddings=128,
    eos_token_ids=(tokenizer.eos_token_id,),
    pad_token_id=tokenizer.pad_token_id,
    mrope_section=(2, 1, 1),
    vision=models.VisionConfig(
      depth=2,
      hidden_size=vision_width,
      intermediate_size=2 * vision_width,
      num_heads=2,
      out_hidden_size=width,
      deepstack_indexes=deepstack,
      patch_size=4,
      num_position_embeddings=16,
      initializer_range=0.3,
    ),
    **policies.vision_ids(tokenizer),
  )


def write(directory, config, seed):
  pairs.write(directory, config, seed, tasks.digits.tokenizer())
  ImageProcessor(**tasks.digits.PROCESSOR).save(directory)
  return directory


@functools.cache
def pair():
  """(student directory, teacher directory)."""
  root = tempfile.mkdtemp(prefix='dopd_jax_vl_pair_')
  student = write(os.path.join(root, 'student'), architecture(2, 16, 16), 0)
  teacher = write(os.path.join(root, 'teacher'), architecture(3, 24, 24, (0, 1)), 1)
  return student, teacher


def config(method='dopd', **changes):
  """As `pairs.config`, on digits and boxes."""
  c = pairs.config(method)
  c.student.path, c.teacher.path = pair()
  c.data.train = 'task:digits?size=24&seed=0'
  c.data.eval = 'task:digits?size=8&seed=1&split=test'
  c.data.max_prompt_tokens = 64
  c.data.patch_bucket = 16
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return configs.validate(c)
