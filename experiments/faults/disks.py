"""Disks that fill up or become read-only while a checkpoint is written.

The disk is a real one: a tmpfs of a chosen size in a mount namespace of its own, which needs no
rights beyond those of a user (`unshare` and `nsenter` of util-linux).
"""

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator

from experiments.faults import lab as labs
from experiments.faults.lab import Ended, Lab, Trial

NOT_HERE = 'not tried: this machine gives users no mount namespaces'


class Disk:
  """A tmpfs at `place` that only commands behind `inside` see, and this process by `path`."""

  def __init__(self, place: pathlib.Path, size: str):
    place.mkdir(parents=True, exist_ok=True)
    self._place = place
    words = ['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o "$1" disk "$2" && exec cat', 'sh']
    self._holder = subprocess.Popen(
      [*words, f'size={size}', place], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert self._holder.stdin and self._holder.stdout
    self._holder.stdin.write(b'\n')
    self._holder.stdin.flush()
    if not self._holder.stdout.readline():
      raise OSError(NOT_HERE)
    self.inside = ['nsenter', '-t', f'{self._holder.pid}', '-U', '-m', '--preserve-credentials']
    self.inside += ['--wd=.']
    self.path = pathlib.Path(f'/proc/{self._holder.pid}/root{place}')

  def remount(self, options: str) -> bool:
    """Whether the disk is now mounted so; it can't become read-only while a file is written."""
    words = [*self.inside, 'mount', '-o', f'remount,{options}', str(self._place)]
    return not subprocess.run(words, capture_output=True, check=False).returncode

  def close(self) -> None:
    """The disk is gone."""
    self._holder.communicate()


def full(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """Disks with room for no checkpoint, for one and for two."""
  for size in ('1m', '2500k', '4m')[done:]:
    workdir = lab.fresh('full')
    with contextlib.ExitStack() as stack:
      try:
        disk = Disk(workdir / 'checkpoints', size)
      except OSError as error:
        yield Trial(f'a disk of {size}', str(error), False)
        continue
      stack.callback(disk.close)
      ended = lab.run(workdir, inside=disk.inside)
      yield _judge(lab, f'a disk of {size}', workdir, disk, ended, 'size=64m', 'No space left')


def read_only(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """The disk becomes read-only as soon as the first, third or sixth save has begun."""
  for number in (1, 3, 6)[done:]:
    what, workdir = f'read-only in save {number}', lab.fresh('read_only')
    with contextlib.ExitStack() as stack:
      try:
        disk = Disk(workdir / 'checkpoints', '64m')
      except OSError as error:
        yield Trial(what, str(error), False)
        continue
      stack.callback(disk.close)
      process = lab.start(workdir, inside=disk.inside)
      path, step = disk.path, number * labs.EVERY
      process.wait_for(lambda path=path, step=step: (path / f'{step:08d}').exists())
      while process.running() and not disk.remount('ro'):
        pass
      yield _judge(lab, what, workdir, disk, process.end(), 'rw', 'Read-only file system')


def _judge(
  lab: Lab, what: str, workdir: pathlib.Path, disk: Disk, ended: Ended, cure: str, reason: str
) -> Trial:
  """The run must have ended with a sentence; with the disk cured it must go on to the same end."""
  saves = sorted(int(p.parent.name) for p in disk.path.glob('*/manifest.json'))
  told = ended.told(reason)
  disk.remount(cure)
  after = lab.run(workdir, inside=disk.inside)
  same = after.code == 0 and lab.same(workdir)
  lost = 'nothing saved is lost' if same else 'NOT EQUAL afterwards'
  going_on = f'Going on from step {saves[-1]}' in after.log if saves else True
  seen = f'exit {ended.code}: {ended.sentence[:220]}; checkpoints {saves} stay, {lost}'
  return Trial(what, seen, told and same and going_on, {'checkpoints': saves})
