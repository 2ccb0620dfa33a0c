"""Frozen weights as they are held: half of the memory, and not a bit of difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import config as configs
from dopd_jax import models, policies, sharding
from dopd_jax.errors import UserError
from tests import pairs
from tests.models import tiny


@pytest.mark.parametrize('kind', ['qwen3-untied', 'llama'])
def test_held_parameters_compute_the_same_bits(kind):
  config = tiny.config(kind)
  model = models.build(config, compute_dtype=jnp.bfloat16)
  # Norms that bfloat16 cannot hold: they are used in float32 and must stay so.
  params = jax.tree.map(lambda x: x * 1.001, model.init(jax.random.key(0)))
  held = models.held(params, jnp.bfloat16)
  tokens, valid = tiny.batch([9, 5], 9)
  one, other = (model.forward(p, tokens, valid)[0] for p in (params, held))
  np.testing.assert_array_equal(one.astype(np.float32), other.astype(np.float32))
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  assert size(held) < 0.6 * size(params)
  assert {x.dtype for x in jax.tree.leaves(held)} == {jnp.dtype('float32'), jnp.dtype('bfloat16')}


def test_a_pair_holds_its_teacher_in_the_compute_dtype():
  config = configs.validate(pairs.config(compute_dtype='bfloat16'))
  pair = policies.load_pair(config, sharding.make_mesh(), {'teacher'})
  assert pair.teacher.params['embedding'].dtype == jnp.bfloat16
  assert pair.student.params['embedding'].dtype == jnp.float32
  on_cpu = policies.load_pair(configs.validate(pairs.config()), sharding.make_mesh(), {'teacher'})
  assert {x.dtype for x in jax.tree.leaves(on_cpu.teacher.params)} == {jnp.dtype('float32')}


def test_one_model_given_twice_is_told_though_it_is_held_in_fewer_bits():
  student, _ = pairs.pair()
  config = configs.validate(pairs.config(compute_dtype='bfloat16', teacher__path=student))
  with pytest.raises(UserError, match='teacher and student have the same parameters'):
    policies.load_pair(config, sharding.make_mesh(), {'teacher'})
