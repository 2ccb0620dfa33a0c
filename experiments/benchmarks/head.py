"""Seconds and memory of the loss head: fused, and by its definition; forward and backward.

    python -m experiments.benchmarks.head --peer='.venv-trl/bin/python trl_loss.py'

Random hidden states through two heads of random weights, all tokens with one rule, gradients in the
student's hidden states and head. The floor is that of the matmuls alone at the measured rate.
`gradient_error` is of the student's hidden states over the first 1,024 tokens, relative to the
definition in float32 on the same inputs.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from dopd_jax.losses import rules
from dopd_jax.losses.head import Part, Rows, Setting, head_grads
from experiments.benchmarks import harness

_TOKENS = flags.DEFINE_integer('tokens', 512, 'Tokens.')
_VOCAB = flags.DEFINE_integer('vocab', 151_936, 'Rows of both heads.')
_STUDENT = flags.DEFINE_integer('student_width', 1024, 'Width of the student.')
_TEACHER = flags.DEFINE_integer('teacher_width', 2048, 'Width of the teacher.')
_RULE = flags.DEFINE_enum('rule', 'js', ['js', 'reverse_kl', 'top_k'], 'What every token has.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'Of hidden states and heads.')
_TILE = flags.DEFINE_integer('tile', 128, 'Tokens whose logits exist at once; 0: automatic.')
_COLUMNS = flags.DEFINE_integer('columns', 0, 'Stream over so many columns; 0: whole rows.')
_DENSE = flags.DEFINE_bool(
  'dense', False, 'The definition with autodiff in place of the fused head.'
)


def main(argv):
  """Compiles once, runs a few times, prints the line."""
  del argv
  N, V, D, E = _TOKENS.value, _VOCAB.value, _STUDENT.value, _TEACHER.value
  dtype = jnp.dtype(_DTYPE.value)
  rule = {
    'js': rules.Rule('T', 'js'),
    'reverse_kl': rules.Rule('T', 'reverse_kl'),
    'top_k': rules.Rule('T', 'reverse_kl', 'top_k', k=128),
  }[_RULE.value]
  setting = Setting(((rule,),), tile=_TILE.value, columns=_COLUMNS.value)
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda i, *shape, scale=1.0: (scale * jax.random.normal(keys[i], shape)).astype(dtype)
  args = normal(0, N, D), normal(1, V, D, scale=0.02), normal(2, N, E), normal(3, V, E, scale=0.02)

  def rows(n):
    return Rows(
      jnp.zeros(n, jnp.int32), jnp.ones(n, bool), jnp.zeros(n, jnp.int32), jnp.full(n, 1 / n)
    )

  def fused(hidden, head, teacher, teacher_head):
    source = {'T': (Part(teacher, teacher_head),)}
    loss, _, grads = head_grads(setting, hidden, head, source, rows(len(hidden)))
    return loss, grads

  def dense(hidden, head, teacher, teacher_head):
    logits = lambda h, w: jnp.einsum('ND,VD->NV', h, w, preferred_element_type=jnp.float32)
    sources = {'T': logits(teacher, teacher_head)}
    of = rows(len(hidden))

    def loss(hidden, head):
      z = logits(hidden, head)
      return jnp.mean(rules.token_loss(setting.table, z, sources, of.tokens, of.regime))

    return jax.value_and_grad(loss, (0, 1))(hidden, head)

  def gradient_error():
    first = [x[:1024] for x in args[::2]]
    inputs = first[0], args[1], first[1], args[3]
    ours = jax.jit(dense if _DENSE.value else fused)(*inputs)[1][0].astype(jnp.float32)
    with jax.default_matmul_precision('highest'):
      true = jax.jit(dense)(*(x.astype(jnp.float32) for x in inputs))[1][0]
    return float(jnp.linalg.norm(ours - true) / jnp.linalg.norm(true))

  rates = harness.ceilings(dtype)
  compiled = jax.jit(dense if _DENSE.value else fused).lower(*args).compile()
  jax.block_until_ready(args)
  with harness.Memory() as memory:
    times = harness.seconds(lambda: compiled(*args))
  flop = 2 * N * V * (3 * D + E)
  ours = {
    **times,
    'loss': float(compiled(*args)[0]),
    'gradient_error': gradient_error(),
    'peak_gib_over_inputs': memory.gib,
    'temporary_gib': round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 3),
    'head_gradient_gib': round(4 * V * D / 2**30, 3),
    **rates,
    'floor_s': round(flop / rates['matmul_tflops'] / 1e12, 3),
    'tflops': round(flop / times['median_s'] / 1e12, 3),
  }
  harness.report('head', ours)


if __name__ == '__main__':
  app.run(main)
