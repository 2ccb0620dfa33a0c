"""Eight fake CPU devices for every test, and absl flags that count as parsed.

On a GPU the kernels alone: DOPD_JAX_TEST_PLATFORM=cuda JAX_DEFAULT_MATMUL_PRECISION=highest
python -m pytest tests/losses tests/models/test_attention.py -k "not over_devices"
"""

import os
import sys
import time

import jax
from jax._src import cache_key, compiler

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test may reach for a hub
jax.config.update('jax_platforms', os.environ.get('DOPD_JAX_TEST_PLATFORM', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)
# Tests compile far more than they compute. Commands under test run in processes of their own,
# optimised.
jax.config.update('jax_disable_most_optimizations', True)
_flags = os.environ.get('XLA_FLAGS')
_quick = '--xla_cpu_parallel_codegen_split_count=1'
if jax.__version_info__ < (0, 11):  # a flag that XLA doesn't know ends the process without a word
  _quick += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{_flags or ""} {_quick}'
jax.devices()  # reads the flags, which are not for commands under test
if _flags is None:
  del os.environ['XLA_FLAGS']
else:
  os.environ['XLA_FLAGS'] = _flags


def _compile_once() -> None:
  """What one test compiled, the next does not: runs of the trainer share most of their programs.

  jax's own cache is no help here. It reads programs back from files, and XLA:CPU (jaxlib 0.10.2)
  then forgets in which order a program's collectives run, so that shards meet in the wrong ones.
  """
  compiled, compile_one = {}, compiler.compile_or_get_cached

  def compile_or_reuse(backend, module, devices, options, callbacks, *rest, **more):
    key = cache_key.get(module, devices, options, backend)
    if key in compiled:
      return compiled[key]
    start = time.monotonic()
    made = compile_one(backend, module, devices, options, callbacks, *rest, **more)
    if not callbacks and time.monotonic() - start > 0.3:
      compiled[key] = made
      if len(compiled) > 100:  # a process may map only so many pieces of memory
        del compiled[next(iter(compiled))]
    return made

  compiler.compile_or_get_cached = compile_or_reuse


_compile_once()

# The TPU compiler, where `make` could install it; not on the path of commands under test.
sys.path.append(os.path.join(sys.prefix, 'libtpu'))

try:
  from absl import flags
except ImportError:  # the kernels are also tested where only jax is installed
  pass
else:
  flags.FLAGS.mark_as_parsed()


# Files in the order of their slow tests' seconds, so that no worker is left alone with a long one.
LONGEST = (
  'test_commands',
  'test_distributed',
  'test_image_runs',
  'test_fuzz',
  'test_colab',
  'test_train',
)


def pytest_collection_modifyitems(items):
  """The longest files first; `--dist loadscope --no-loadscope-reorder` takes them in this order."""
  rank = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
