"""What the head takes beside its inputs and its gradients, as the compiler says: a number a test.

DOPD's update at the size of Qwen3-8B -> Qwen3-1.7B, bfloat16, shapes alone: nothing is computed.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dopd_jax.losses import rules
from dopd_jax.losses.dopd import STUDENT, TEACHER, dopd_rules
from dopd_jax.losses.head import Part, Rows, Setting, head_grads

V, LIVE, D, E = 151_936, 151_669, 2048, 4096
GIB = 2**30


@pytest.fixture(autouse=True)
def optimised():
  """Buffers are those of real runs, not of the quick compilations of other tests."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


def dopd(hidden, head, teacher, teacher_head, own, rows, d_head, setting):
  sources = {TEACHER: (Part(teacher, teacher_head),), STUDENT: (Part(own, head),)}
  return head_grads(setting, hidden, head, sources, rows, d_head)


def dense(hidden, head, teacher, teacher_head, own, rows, d_head, setting):
  """The same by the definition: whole logits and autodiff."""
  logits = lambda h, w: jnp.einsum('ND,VD->NV', h, w, preferred_element_type=jnp.float32)[:, :LIVE]
  sources = {TEACHER: logits(teacher, teacher_head), STUDENT: logits(own, head)}

  def loss(hidden, head):
    z = logits(hidden, head)
    return rows.coef @ rules.token_loss(setting.table, z, sources, rows.tokens, rows.regime)

  d_hidden, more = jax.grad(loss, (0, 1))(hidden, head)
  return d_hidden, d_head + more


def temporaries(tokens, sharding=None, dtype=jnp.bfloat16, fn=dopd, **shape):
  """Bytes beside inputs, gradients and the float32 gradient of the head."""
  like = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
  number = functools.partial(like, tokens)
  rows = Rows(
    number(dtype=jnp.int32), number(dtype=jnp.bool_), number(dtype=jnp.int32),
    number(dtype=jnp.float32),
  )  # fmt: skip
  args = (
    like(tokens, D), like(V, D), like(tokens, E), like(V, E), like(tokens, D), rows,
    like(V, D, dtype=jnp.float32),
  )  # fmt: skip
  setting = Setting(dopd_rules(k=128), vocab=LIVE, **shape)
  run = jax.jit(functools.partial(fn, setting=setting), donate_argnums=6)
  return run.lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_three_gibibytes_at_most_and_32_kibibytes_a_token():
  few, many, whole = temporaries(4096), temporaries(32_768), temporaries(4096, fn=dense)
  print(f'4,096 tokens {few / GIB:.2f} GiB, 32,768 tokens {many / GIB:.2f} GiB')
  print(f'4,096 tokens, dense: {whole / GIB:.1f} GiB')
  assert whole > 5 * few
  assert few <= 3 * GIB and many <= 3 * GIB
  assert many - few <= 32 * 1024 * (32_768 - 4096)


def test_streaming_takes_a_quarter():
  """In float32: a CPU, unlike accelerators, widens a whole bfloat16 table to read a block of it."""
  streamed, whole = (
    temporaries(4096, dtype=jnp.float32, tile=256, columns=columns) for columns in (8192, 0)
  )
  print(f'streamed {streamed / GIB:.2f} GiB, whole rows {whole / GIB:.2f} GiB')
  assert streamed < whole / 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_tpu_takes_the_same_for_any_number_of_tokens(monkeypatch):
  """Compiled for a v5e, without one."""
  from jax.experimental import topologies

  for name, value in {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}.items():
    monkeypatch.setitem(os.environ, name, value)
  chip = topologies.get_topology_desc('v5e:2x2', platform='tpu').devices[:1]
  sharding = NamedSharding(Mesh(np.array(chip), ('x',)), P())
  few, many = temporaries(4096, sharding), temporaries(32_768, sharding)
  print(f'4,096 tokens {few / GIB:.3f} GiB, 32,768 tokens {many / GIB:.3f} GiB')
  assert few <= 3 * GIB and abs(many - few) <= 0.1 * few
