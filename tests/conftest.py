"""Eight fake CPU devices for every test, and absl flags that count as parsed."""

import os

import jax

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test may reach for a hub
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Tests compile far more than they compute. Commands under test run in processes of their own,
# optimised.
jax.config.update('jax_disable_most_optimizations', True)
# What one test compiled, the next does not: runs of the trainer share most of their programs.
jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/dopd_jax/tests'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

try:
  from absl import flags
except ImportError:  # the kernels are also tested where only jax is installed
  pass
else:
  flags.FLAGS.mark_as_parsed()
