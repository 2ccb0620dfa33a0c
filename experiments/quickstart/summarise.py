"""Start and end of finished runs as one JSON file:  python summarise.py OUT.json WORKDIR...

Each entry has the method, the seed, the versions, and accuracy with its 95 % Wilson interval on the
held-out problems, without the hint, before and after; the teacher's beside it.
"""

import json
import pathlib
import sys


def summarise(workdir):
  """One run."""
  about = json.loads((workdir / 'config.json').read_text())
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
  looked = [row for row in rows if 'eval/accuracy' in row]
  accuracy = lambda row, name: [row[f'eval/{name}{end}'] for end in ('', '_low', '_high')]
  trained = rows[1:]
  mean = lambda name: sum(row[name] for row in trained) / len(trained)
  shares = [name for name in trained[0] if name.startswith('train/regime_share/')]
  return {
    'method': about['config']['objective']['name'],
    'seed': about['config']['seed'],
    'steps': rows[-1]['step'],
    'before': accuracy(looked[0], 'accuracy'),
    'after': accuracy(looked[-1], 'accuracy'),
    'teacher': accuracy(looked[0], 'teacher_accuracy'),
    'regime_shares': {name.rsplit('/', 1)[1]: round(mean(name), 4) for name in shares},
    'entropy_S': [trained[0]['train/entropy/S'], trained[-1]['train/entropy/S']],
    'versions': about['versions'],
  }


if __name__ == '__main__':
  out, *workdirs = map(pathlib.Path, sys.argv[1:])
  out.write_text(json.dumps([summarise(w) for w in workdirs], indent=1) + '\n')
