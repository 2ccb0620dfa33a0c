"""Every benchmark in one go, each beside its peer where one is given; a JSON file each and a table.

    python -m experiments.benchmarks.all --trl='.venv-trl/bin/python SCRIPTS' \
        --tunix='.venv-tunix/bin/python SCRIPTS'
    python -m experiments.benchmarks.all --shapes=gpu --liger=python     # bfloat16, one card
    python -m experiments.benchmarks.all --shapes=smoke   # does it run: a minute

A peer is a Python of its own environment and a folder with trl_loss.py, trl_opd.py or
tunix_sampler.py, scripts that print one JSON line (Liger's is here); none of them is a dependency
of this package.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

_SHAPES = flags.DEFINE_enum('shapes', 'cpu', ['cpu', 'gpu', 'smoke'], 'Which workloads.')
_OUT = flags.DEFINE_string('out', '', 'Folder of the results; default: results/SHAPES beside this.')
_TRL = flags.DEFINE_string('trl', '', 'PYTHON FOLDER of TRL.')
_TUNIX = flags.DEFINE_string('tunix', '', 'PYTHON FOLDER of google-tunix.')
_LIGER = flags.DEFINE_string('liger', '', 'PYTHON of liger_kernel.')
_ONLY = flags.DEFINE_list('only', [], 'Names of the runs; default: all.')

# Name -> (module, flags, peer: its environment and script)
SMALL = ['--runs=2', '--tokens=64', '--vocab=4096']
RUNS = {
  'cpu': {
    'head': ('head', [], 'trl trl_loss.py'),
    'head_256': ('head', ['--tile=256'], ''),
    'head_streamed': ('head', ['--columns=8192'], ''),
    'head_top_k': ('head', ['--rule=top_k'], ''),
    'head_dense': ('head', ['--dense'], ''),
    'sampler': ('sampler', [], 'tunix tunix_sampler.py'),
    'sampler_transformers': ('sampler', [], 'here peer_transformers.py'),
    'step': ('step', [], 'trl trl_opd.py'),
    'step_opd_hint': ('step', ['--hint=32'], ''),
    'step_dopd_hint': ('step', ['--method=dopd', '--hint=32'], ''),
    'score': ('score', [], ''),
    'attention': ('attention', [], ''),
  },
  'gpu': {
    f'{name}_{size}': (module, ['--dtype=bfloat16', *more], peer)
    for size, student, layers in (('0.6b', 1024, 28), ('1.7b', 2048, 28))
    for name, module, more, peer in (
      ('head', 'head', ['--tile=0', '--tokens=4096', f'--student_width={student}'],
       f'liger peer_liger.py --student_width={student}'),
      ('head_dense', 'head', ['--dense', '--tokens=4096', f'--student_width={student}'], ''),
      ('sampler', 'sampler', ['--vocab=151936', f'--layers={layers}', f'--width={student}',
                              '--batch=64', '--new=512'], ''),
      ('step', 'step', ['--vocab=151936', f'--layers={layers},{layers}',
                        f'--widths={student},2048', '--new=512'], ''),
    )
  } | {
    'attention': ('attention', ['--dtype=bfloat16', '--others=xla,cudnn', '--rows=8',
                                '--tokens=4096'], ''),
  },
  'smoke': {
    'head': ('head', SMALL, ''),
    'head_dense': ('head', [*SMALL, '--dense'], ''),
    'sampler': ('sampler', ['--runs=1', '--new=16'], ''),
    'step': ('step', ['--steps=5', '--new=8', '--batch=8', '--layers=1,1', '--widths=128,128'], ''),
    'score': ('score', ['--runs=1', '--rows=8', '--new=160', '--median=60', '--microbatch=4'], ''),
    'attention': ('attention', ['--runs=1', '--tokens=64'], ''),
  },
}  # fmt: skip


def peer_of(words):
  """The command of a peer; '' where its environment is not given."""
  environment, _, script = words.partition(' ')
  if environment == 'here':
    return f'{sys.executable} {pathlib.Path(__file__).parent / script}'
  given = {'trl': _TRL.value, 'tunix': _TUNIX.value, 'liger': _LIGER.value}.get(environment, '')
  if not given:
    return ''
  python, folder = [*given.split(), str(pathlib.Path(__file__).parent)][:2]
  return f'{python} {folder}/{script}'


def table(results):
  """The runs as lines of a Markdown table."""
  lines = [
    '| run | median, s | fastest–slowest, s | of the peer | what else |',
    '|---|---:|---:|---:|---|',
  ]
  for name, result in results.items():
    ours, peers = result['ours'], result['peers']
    ratio = ', '.join(f'{p["ours_over_peer"]:.2f} of {p.get("peer", "?")}' for p in peers) or '-'
    skip = ('median_s', 'fastest_s', 'slowest_s')
    more = ', '.join(f'{k} {v}' for k, v in ours.items() if k not in skip)
    spread = f'{ours["fastest_s"]:.3g}–{ours["slowest_s"]:.3g}'
    lines.append(f'| {name} | {ours["median_s"]:.3g} | {spread} | {ratio} | {more} |')
  return '\n'.join(lines) + '\n'


def main(argv):
  """Runs one after the other, each in a process of its own."""
  del argv
  here = pathlib.Path(__file__).parent
  out = pathlib.Path(_OUT.value) if _OUT.value else here / 'results' / _SHAPES.value
  out.mkdir(parents=True, exist_ok=True)
  for name, (module, words, peer) in RUNS[_SHAPES.value].items():
    if _ONLY.value and name not in _ONLY.value:
      continue
    command = [sys.executable, '-m', f'experiments.benchmarks.{module}', *words]
    command.append(f'--out={out / name}.json')
    if peer_of(peer):
      command.append(f'--peer={peer_of(peer)}')
    print(name, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=here.parent.parent)
  files = {name: out / f'{name}.json' for name in RUNS[_SHAPES.value]}
  results = {n: json.loads(f.read_text()) for n, f in files.items() if f.exists()}
  (out / 'table.md').write_text(table(results))
  print(table(results))


if __name__ == '__main__':
  app.run(main)
