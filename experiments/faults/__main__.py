r"""Injects every fault into the training command, counts what happens, and writes the table.

  python -m experiments.faults                          # all of them: about an hour on 2 CPU cores
  python -m experiments.faults --only=sigkill --kills=5
  python -m experiments.faults --report_only

A fault has one JSON file under `results/`, written after each trial; `table.md` is made from these
files alone. Trials that a file holds are not made again: delete it to inject that fault anew. Exit
code 1 says that something was seen that was not expected.
"""

import itertools
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from rich.console import Console

from dopd_jax import cli, workdirs
from dopd_jax import config as configs
from dopd_jax.errors import UserError
from experiments import common
from experiments.faults import disks, files, kills, numbers
from experiments.faults.lab import SETTINGS, Fault, Lab

FLAGS = flags.FLAGS
HERE = pathlib.Path(__file__).parent


def faults(count: int) -> list[Fault]:
  """The rows of the table, in its order; `count` is the number of kills."""
  goes_on = 'no step lost beyond the last save; after a restart the rows equal the unbroken run'
  sentence = 'exit 2 with one sentence, nothing overwritten'
  return [
    Fault(
      'sigkill',
      'SIGKILL at random moments, in saves too',
      goes_on,
      lambda lab, done: kills.sigkill(lab, count, done),
      count,
    ),
    Fault('sigterm', 'SIGTERM', f'saves the step it is at, exit 0; {goes_on}', kills.sigterm, 3),
    Fault(
      'one_of_two',
      'SIGTERM or SIGKILL to one of two processes',
      f'both save one step, exit 0; or the other, or jax in it, says that one is gone; {goes_on}',
      kills.one_of_two,
      4,
    ),
    Fault('disk_full', 'disk full during a save', f'{sentence}; {goes_on}', disks.full, 3),
    Fault(
      'disk_read_only',
      'disk read-only during a save',
      f'{sentence}; {goes_on}',
      disks.read_only,
      3,
    ),
    Fault(
      'damaged_checkpoint',
      'a file of the newest checkpoint truncated, bit-flipped, empty or missing',
      f'the manifest notices, the newest whole one is used and the log says so; {goes_on}',
      files.damaged,
      12,
    ),
    Fault(
      'changed_data',
      'a data file changes or vanishes between two starts',
      f'{sentence}; the same records in a new file go on',
      files.data_files,
      11,
    ),
    Fault(
      'nan',
      'NaN in a batch, in a weight, in the teacher',
      f'exit 1 (in a file: 2) with one sentence, nothing saved after it; {goes_on}',
      numbers.nan,
      5,
    ),
    Fault('memory', 'a bucket of prompts that fits no memory', sentence, numbers.memory, 1),
    Fault(
      'clock',
      'the wall clock jumps',
      f'sane times, or a save that fails with one sentence; {goes_on}',
      numbers.clocks,
      2,
    ),
  ]


def inject(
  wanted: Sequence[Fault], out: pathlib.Path, seed: int, console: Console, most: int = 0
) -> None:
  """Makes the trials that have no result yet, and writes a fault's file after each of them.

  `most` of each fault, where it is not 0.
  """
  found = {f.name: _read(out / f'{f.name}.json') for f in wanted}
  behind = {name: len(result.get('trials', [])) for name, result in found.items()}
  with tempfile.TemporaryDirectory(prefix='dopd_jax_faults_') as root, common.bar(console) as bar:
    # Moments differ between the parts of a run that was cut off.
    lab = Lab(pathlib.Path(root), f'{seed} {sum(behind.values())}')
    task = bar.add_task('', total=sum(f.count for f in wanted), completed=sum(behind.values()))
    for fault in wanted:
      if behind[fault.name] >= fault.count:
        continue
      bar.update(task, description=fault.name)
      trials = found[fault.name].get('trials', [])
      for trial in itertools.islice(fault.trials(lab, behind[fault.name]), most or None):
        trials.append(trial._asdict())
        bar.advance(task)
        mark = '' if trial.ok else 'NOT EXPECTED: '
        bar.console.print(f'{mark}{trial.what}: {trial.seen}', highlight=False, soft_wrap=True)
        result = {
          'fault': fault.name,
          'injected': fault.injected,
          'expected': fault.expected,
          'as_expected': sum(t['ok'] for t in trials),
          'n': len(trials),
          'of': fault.count,
          'settings': SETTINGS,
          'seed': seed,
          'commit': common.commit(),
          'versions': workdirs.versions(),
          'device': jax.devices()[0].device_kind,
          'trials': trials,
        }
        with workdirs.writing(str(out / f'{fault.name}.json')) as file:
          file.write(json.dumps(result, indent=1).replace(root, 'LAB') + '\n')


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def table(found: Sequence[dict[str, Any]], missing: Sequence[Fault]) -> str:
  """`table.md`: a line a fault, then a line a trial that is not a kill."""
  lines = [
    '# Faults',
    '',
    '| injected | expected | injections | as expected |',
    '|---|---|---:|---:|',
  ]
  for r in found:
    n = f'{r["n"]}' + (f' (of {r["of"]} planned)' if r['n'] < r['of'] else '')
    lines.append(f'| {r["injected"]} | {r["expected"]} | {n} | {r["as_expected"]} |')
  lines += [f'| {f.injected} | {f.expected} | not run here | |' for f in missing]
  for r in found:
    lines += ['', f'**{r["injected"]}**', '', '| | seen | as expected |', '|---|---|---|']
    for trial in r['trials']:
      seen = trial['seen'].replace('|', '\\|')
      lines.append(f'| {trial["what"]} | {seen} | {"yes" if trial["ok"] else "**no**"} |')
  made = sorted(
    {f'jax {r["versions"]["jax"]} on {r["device"]}, commit {r["commit"]}' for r in found}
  )
  lines += ['', f'Made by `python -m experiments.faults` ({"; ".join(made)}).', '']
  return '\n'.join(lines)


def main() -> None:
  """The command."""
  planned = faults(FLAGS.kills)
  names = [fault.name for fault in planned]
  for name in FLAGS.only:
    if name not in names:
      raise UserError(configs.unknown('fault in --only', name, names))
  wanted = [f for f in planned if not FLAGS.only or f.name in FLAGS.only]
  out, console = pathlib.Path(FLAGS.out or HERE), Console()
  if not FLAGS.report_only:
    inject(wanted, out / 'results', FLAGS.seed, console, FLAGS.most)
  paths = {f.name: out / 'results' / f'{f.name}.json' for f in planned}
  found = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
  with workdirs.writing(str(out / 'table.md')) as file:
    file.write(table(found, [f for f in planned if not paths[f.name].exists()]))
  bad = sum(r['n'] - r['as_expected'] for r in found)
  console.print(f'Wrote {out / "table.md"}: {bad} of {sum(r["n"] for r in found)} not as expected')
  if bad:
    sys.exit(1)


if __name__ == '__main__':
  flags.DEFINE_list('only', [], 'The faults to inject; all if empty.')
  flags.DEFINE_integer('kills', 50, 'How often the run is killed.', lower_bound=1)
  flags.DEFINE_integer('most', 0, 'Trials of a fault in this call; 0 is all that are left.')
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  flags.DEFINE_string('out', '', 'Where results/ and table.md go; experiments/faults if empty.')
  flags.DEFINE_bool('report_only', False, 'Makes table.md from the result files.')
  cli.run(main)
