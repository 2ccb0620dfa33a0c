"""Files that are damaged or changed between two starts of a run."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

from experiments.faults import lab as labs
from experiments.faults.lab import Lab, Trial

STEP = 16  # the runs are cut off after this one


def truncate(path: pathlib.Path) -> None:
  """Cuts the file in half."""
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
  """Turns the lowest bit of the byte in the middle."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def empty(path: pathlib.Path) -> None:
  """Leaves nothing of the content."""
  path.write_bytes(b'')


HARMS: dict[str, Callable[[pathlib.Path], None]] = {
  'truncated': truncate,
  'bit-flipped': flip,
  'empty': empty,
  'missing': pathlib.Path.unlink,
}


def largest(saved: pathlib.Path) -> pathlib.Path:
  """The file with most of the arrays."""
  return max((p for p in saved.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


PLACES: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
  'arrays': largest,
  'run.json': lambda saved: saved / 'run.json',
  'manifest.json': lambda saved: saved / 'manifest.json',
}


def damaged(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """The newest checkpoint is damaged: the one before is used, and the log says so."""
  cases = [(place, harm) for place in PLACES for harm in HARMS]
  cases.remove(('manifest.json', 'missing'))  # that is a save that was not finished
  for place, harm in cases[done:]:
    yield _damaged(lab, place, harm)
  yield _all_damaged(lab)


def _damaged(lab: Lab, place: str, harm: str) -> Trial:
  workdir = lab.cut_off('damaged', STEP)
  HARMS[harm](PLACES[place](workdir / 'checkpoints' / f'{STEP:08d}'))
  ended = lab.run(workdir)
  same = ended.code == 0 and lab.same(workdir)
  noticed = f'{STEP:08d} is damaged' in ended.log
  before = STEP - labs.EVERY
  fell_back = f'Going on from step {before} ' in ended.log
  seen = f'exit {ended.code}, {"" if noticed else "NOT "}noticed'
  seen += f', went on from step {before}' if fell_back else ''
  seen += ', equal in the end' if same else f', NOT EQUAL: {ended.sentence[:200]}'
  return Trial(f'{place} {harm}', seen, noticed and fell_back and same)


def _all_damaged(lab: Lab) -> Trial:
  workdir = lab.cut_off('damaged', STEP)
  for saved in (workdir / 'checkpoints').iterdir():
    flip(largest(saved))
  before = labs.digest(workdir)
  ended = lab.run(workdir)
  untouched = labs.digest(workdir) == before
  seen = f'exit {ended.code}: {ended.sentence[:200]}; {_untouched(untouched)}'
  return Trial('every checkpoint bit-flipped', seen, ended.told('damaged') and untouched)


def _untouched(same: bool) -> str:
  return 'nothing overwritten' if same else 'the workdir was CHANGED'


@contextlib.contextmanager
def restored(path: pathlib.Path) -> Iterator[None]:
  """Brings a file back at the end, whatever was done to it."""
  copy = path.with_suffix('.copy')
  shutil.copy(path, copy)
  try:
    yield
  finally:
    shutil.move(copy, path)


def edited(**changes: str) -> Callable[[pathlib.Path], None]:
  """An edit of one record of a file; `record=''` repeats one under another id instead."""

  def edit(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if changes:
      lines[3] |= changes
    else:
      lines.append({**lines[3], 'id': 'new'})
    labs.write(path, lines)

  return edit


def data_files(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """A data file is not what it was when the run began: one sentence, nothing overwritten."""
  other = 'm = 5 ; k = 2 ; m + k = ?'
  cases = {
    'a prompt of data.train changed': (lab.train, edited(prompt=other)),
    'an answer of data.train changed': (lab.train, edited(answer='no')),
    'a hint of data.train changed': (lab.train, edited(privileged_context='m')),
    'a record of data.train added': (lab.train, edited()),
    'data.train is gone': (lab.train, pathlib.Path.unlink),
    'data.train is empty': (lab.train, empty),
    'data.train is cut in the middle of a line': (lab.train, truncate),
    'a prompt of data.eval changed': (lab.eval, edited(prompt=other)),
    'an answer of data.eval changed': (lab.eval, edited(answer='no')),
    'data.eval is gone': (lab.eval, pathlib.Path.unlink),
  }
  for what, (path, change) in list(cases.items())[done:]:
    workdir = lab.cut_off('data', STEP)
    before = labs.digest(workdir)
    with restored(path):
      change(path)
      ended = lab.run(workdir)
    untouched = labs.digest(workdir) == before
    seen = f'exit {ended.code}: {ended.sentence[:200]}; {_untouched(untouched)}'
    yield Trial(what, seen, ended.told(path.stem) and untouched)
  yield _rewritten(lab)


def _rewritten(lab: Lab) -> Trial:
  """The same records in a new file are the same data."""
  workdir = lab.cut_off('data', STEP)
  with restored(lab.train):
    lab.train.write_bytes(lab.train.read_bytes() + b'\n')
    ended = lab.run(workdir)
  same = ended.code == 0 and lab.same(workdir)
  seen = f'exit {ended.code}, {"equal in the end" if same else "NOT EQUAL"}'
  return Trial('data.train written again with the same records', seen, same)
