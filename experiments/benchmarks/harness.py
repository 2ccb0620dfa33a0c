"""What the benchmarks share: timing, memory, the machine's ceilings, and a peer in the same run.

A peer is any command that prints one JSON line last, with `median_s` or `median_step_s` in it:

    python -m experiments.benchmarks.head --peer='.venv-trl/bin/python trl_loss.py'
"""

import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from dopd_jax.models import DecoderConfig

FLAGS = flags.FLAGS
_RUNS = flags.DEFINE_integer('runs', 5, 'Timed runs, after one that is not counted.')
_PEERS = flags.DEFINE_multi_string(
  'peer', [], 'A command to run beside ours; its last line is JSON.'
)
_OUT = flags.DEFINE_string('out', None, 'A JSON file to write as well.')
_STATUS = pathlib.Path('/proc/self/status')


def qwen3(layers: int, width: int, vocab: int, **more: Any) -> DecoderConfig:
  """As the peers': feed-forward three times the width, half as many key heads as query heads."""
  return DecoderConfig(
    vocab_size=vocab,
    hidden_size=width,
    intermediate_size=3 * width,
    num_hidden_layers=layers,
    num_attention_heads=width // 64,
    num_key_value_heads=width // 128,
    head_dim=64,
    rope_theta=1_000_000.0,
    **more,
  )


def seconds(fn: Callable[[], Any]) -> dict[str, float]:
  """Median, fastest and slowest seconds of `fn` until its arrays are there."""
  found = []
  for _ in range(_RUNS.value + 1):
    start = time.perf_counter()
    jax.block_until_ready(fn())
    found.append(time.perf_counter() - start)
  found = found[1:]
  return {
    'median_s': round(statistics.median(found), 4),
    'fastest_s': round(min(found), 4),
    'slowest_s': round(max(found), 4),
  }


class Memory:
  """GiB of resident memory that a block takes at its peak, over what there was before; Linux, CPU.

  None elsewhere: a GPU's allocator keeps its peak for good.
  """

  def __enter__(self):
    gc.collect()
    self.gib = None
    self.known = _STATUS.exists() and jax.default_backend() == 'cpu'
    if self.known:
      pathlib.Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
      self.before = _resident('VmRSS')
    return self

  def __exit__(self, *_):
    if self.known:
      self.gib = round(_resident('VmHWM') - self.before, 3)


def _resident(key: str) -> float:
  lines = _STATUS.read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def ceilings(dtype: Any = jnp.float32) -> dict[str, float]:
  """What the machine reaches: TFLOP/s of a large matmul, GB/s of a copy (read and written)."""
  n = 2048 if jax.default_backend() == 'cpu' else 8192
  a = jnp.ones((n, n), dtype)
  multiply, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
  large = jnp.ones((n // 8 * n, 32), jnp.float32)
  return {
    'matmul_tflops': round(2 * n**3 / seconds(lambda: multiply(a))['fastest_s'] / 1e12, 3),
    'copy_gb_per_s': round(2 * large.nbytes / seconds(lambda: copy(large))['fastest_s'] / 1e9, 1),
  }


def report(name: str, ours: dict[str, Any]) -> None:
  """Runs the peers, then prints one JSON line of everything."""
  result = {
    'benchmark': name,
    'ours': ours,
    'peers': [_peer(command) for command in _PEERS.value],
    'flags': {f.name: f.value for f in FLAGS.flags_by_module_dict()[sys.argv[0]]},
    'runs': _RUNS.value,
    'machine': {
      'device': jax.devices()[0].device_kind,
      'cpu': platform.processor() or platform.machine(),
      'cores': os.cpu_count(),
    },
    'versions': {p: importlib.metadata.version(p) for p in ('jax', 'jaxlib', 'flax')},
  }
  for peer in result['peers']:
    theirs = peer.get('median_s', peer.get('median_step_s'))
    peer['ours_over_peer'] = round(ours['median_s'] / theirs, 3)
  line = json.dumps(result)
  print(line)
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + '\n')


def _peer(command: str) -> dict[str, Any]:
  done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f'{command} failed:\n{done.stderr[-2000:]}')
  words = shlex.split(command)
  script = next((pathlib.Path(word).name for word in words if word.endswith('.py')), words[-1])
  return {'script': script, **json.loads(done.stdout.strip().splitlines()[-1])}
