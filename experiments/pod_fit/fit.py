r"""Compiles the paper's pairs for pods that are not there, and puts the results in a table.

  python -m experiments.pod_fit.fit --jobs=2          # what has no result yet: hours on two cores
  python -m experiments.pod_fit.fit --timeout=0       # the table alone

A run is `dopd_jax.compile_check` in a process of its own; its JSON is in results/.
"""

import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from absl import app, flags

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / 'results'
# The first pair is compiled for PODS, and every pair for the first of SMALL that it fits.
PODS = ('v5e:16x16', 'v5e:8x8', 'v5:4x4x4', 'v6e:8x8')
SMALL = ('v5e:2x2', 'v5e:2x4', 'v5e:4x4', 'v5e:4x8', 'v5e:8x8')
PAIRS = (
  'configs/llm.py:teacher=8b,student=1.7b',
  'configs/llm.py:teacher=8b,student=0.6b',
  'configs/llm.py:teacher=4b,student=1.7b',
  'configs/llm.py:teacher=4b,student=0.6b',
  'configs/llm.py:teacher=1.7b,student=0.6b',
  'configs/vlm.py:teacher=8b,student=2b',
)
GIB = 2**30


def first(config: str, topologies: Sequence[str], timeout: int) -> None:
  """Checks one topology after the other until the run fits; what has a result is not run again."""
  for topology in topologies:
    path = result(config, topology)
    if json.loads(path.read_text())['fits'] if path.exists() else run(config, topology, timeout):
      break


def run(config: str, topology: str, timeout: int) -> bool:
  """One check; whether it fits. What runs out of time leaves no result."""
  words = [f'--config={config}', f'--topology={topology}', '--search=10', f'--out={RESULTS}']
  try:
    subprocess.run(
      [sys.executable, '-m', 'dopd_jax.compile_check', *words], timeout=timeout, check=True
    )
  except subprocess.TimeoutExpired:
    print(f'{config} on {topology}: not finished in {timeout} seconds')
    return False
  return json.loads(result(config, topology).read_text())['fits']


def result(config: str, topology: str) -> pathlib.Path:
  """Where the JSON of a run goes, as `compile_check` names it."""
  _, _, arguments = config.partition(':')
  sizes = dict(part.split('=') for part in arguments.split(','))
  family, end = ('qwen3-vl', '-instruct') if 'vlm' in config else ('qwen3', '')
  models = '_'.join(f'{family}-{sizes[who]}{end}' for who in ('teacher', 'student'))
  return RESULTS / f'{models}_{topology.replace(":", "-")}.json'


def table(results: list[dict[str, Any]]) -> str:
  """The results as GitHub reads them: GiB a device, a row a run."""
  heads = ['pair', 'topology', 'data x fsdp x tensor', 'held', 'rollout', 'score', 'update', 'of']
  heads += ['moved', 'TFLOP', 'compiled in', '']
  lines = [f'| {" | ".join(heads)} |', '|---|---|---|' + '---:|' * (len(heads) - 3)]
  for r in results:
    programs = r['programs']
    name = lambda path: path.rpartition('/')[2].removesuffix('-Instruct')
    every = [n for n in ('rollout', 'score', 'update') if n in programs]
    moved = ' / '.join(
      gib(sum(c['bytes'] for c in programs[n].get('collectives', []))) for n in every
    )
    flop = ' / '.join(f'{programs[n]["flops"] / 1e12:,.0f}' for n in every)
    seconds = ' / '.join(f'{programs[n]["seconds"]:.0f} s' for n in every)
    changes = ' '.join(f'{key}={value}' for key, value in r.get('changes', {}).items())
    verdict = f'fits with {changes}' if r['fits'] else f'does not fit: {r["proposal"]}'
    if len(every) < 3:
      verdict = f'{", ".join(every)} alone: {verdict}'
    cells = [f'{name(r["teacher"])} -> {name(r["student"])}', r['topology']]
    cells += [' x '.join(map(str, r['mesh'].values())), gib(sum(r['held'].values()))]
    cells += [needs(programs.get(n)) for n in ('rollout', 'score', 'update')] + [
      f'{r["memory"] / GIB:.2f}'
    ]
    lines.append(f'| {" | ".join([*cells, moved, flop, seconds, verdict])} |')
  return '\n'.join(lines) + '\n'


def needs(program: dict[str, Any] | None) -> str:
  """GiB that a program needs, or at least needs where it was refused; a dash if it was not run."""
  if program is None:
    return '–'
  if 'needs' in program:
    return gib(program['needs'])
  least = program.get('needs_at_least')
  return 'refused' if least is None else f'> {gib(least)}'


def gib(size: int) -> str:
  """A size for a cell."""
  return f'{size / GIB:.1f}'


def main(_: Any) -> None:
  """Runs what is missing, then writes the table."""
  RESULTS.mkdir(exist_ok=True)
  timeout = flags.FLAGS.timeout
  found = lambda: [json.loads(path.read_text()) for path in sorted(RESULTS.glob('*.json'))]
  tasks = [functools.partial(first, PAIRS[0], [topology], timeout) for topology in PODS]
  tasks += [functools.partial(first, pair, SMALL, timeout) for pair in PAIRS]
  if timeout:
    with futures.ThreadPoolExecutor(flags.FLAGS.jobs) as pool:
      try:
        for future in [pool.submit(task) for task in tasks]:
          future.result()
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  (HERE / 'table.md').write_text(table(found()))


if __name__ == '__main__':
  flags.DEFINE_integer('jobs', 1, 'Checks at a time.', lower_bound=1)
  flags.DEFINE_integer('timeout', 7200, 'Seconds a run; 0 runs nothing.')
  app.run(main)
