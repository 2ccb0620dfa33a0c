"""Scores answers by reasoning_gym in a process that can do little else.

Some of its families evaluate the answer, which a model wrote, as Python. So every answer is scored
in a process of its own, forked from one that has reasoning_gym loaded, and limited:

    network    no sockets; no other programs or processes, no signals to others (seccomp; Linux)
    time       SECONDS of wall time an answer
    memory     BYTES of address space
    files      none can be written; the environment, with its tokens, is not passed on

What it can still do is read files of this user, and tell nobody. This file imports the standard
library alone: it is also the program that the process runs.
"""

import atexit
import contextlib
import ctypes
import json
import os
import platform
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

SECONDS = 10.0
BYTES = 4 << 30
_PATIENCE = 120.0  # seconds for the first import of reasoning_gym, on a busy machine
_KEPT = ('PATH', 'HOME', 'LANG', 'PYTHONPATH', 'VIRTUAL_ENV')
_EVERYWHERE = (424, 425, 435)  # pidfd_send_signal, io_uring_setup, clone3
# By machine: its name to the kernel, and the numbers of socket, execve, execveat, kill, tkill,
# tgkill, ptrace, clone, fork, vfork.
_SYSCALLS = {
  'x86_64': (0xC000003E, (41, 59, 322, 62, 200, 234, 101, 56, 57, 58)),
  'aarch64': (0xC00000B7, (198, 221, 281, 129, 130, 131, 117, 220)),
}


class Refused(Exception):
  """The family or its entry can't be used; the message says why."""


class Judge:
  """The process, from the parent's side. It starts with the first answer.

  Args:
    seconds: of wall time an answer may take.
  """

  def __init__(self, seconds: float = SECONDS):
    self._seconds = seconds
    self._process: subprocess.Popen | None = None
    self._lock = threading.Lock()

  def score(self, family: str, answer: str, entry: Mapping[str, Any]) -> float:
    """The family's score of an answer; 0 where scoring it failed or took too much.

    Raises:
      Refused: there is no such family, or the entry lacks what it needs.
      OSError: the process could not be started, or died.
    """
    line = json.dumps({'family': family, 'answer': answer, 'entry': entry}).encode() + b'\n'
    with self._lock:
      process = self._started()
      assert process.stdin and process.stdout
      process.stdin.write(line)
      process.stdin.flush()
      said = _line(process.stdout, _PATIENCE + self._seconds)
    if said is None:
      self.close()
      raise OSError('the process that scores answers died')
    if 'refused' in said:
      raise Refused(said['refused'])
    return said['score']

  def close(self) -> None:
    """Ends the process; the next answer starts another."""
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._process = None

  def _started(self) -> subprocess.Popen:
    if self._process is None or self._process.poll() is not None:
      kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
      self._process = subprocess.Popen(
        [sys.executable, '-P', __file__, str(self._seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept | {'OPENBLAS_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'},
      )
      atexit.register(self.close)
    return self._process


def _line(file: Any, seconds: float) -> dict[str, Any] | None:
  """The next line of JSON from a pipe, or None where none comes in time."""
  parts = b''
  while not parts.endswith(b'\n'):
    ready, _, _ = select.select([file], [], [], seconds)
    more = os.read(file.fileno(), 1 << 16) if ready else b''
    if not more:
      return None
    parts += more
  try:
    return json.loads(parts)
  except ValueError:
    return None


# --------------------------------------------------------------------------- inside the process


def serve(seconds: float) -> None:
  """Answers lines from stdin on stdout until stdin ends."""
  import resource

  out = os.fdopen(os.dup(1), 'wb')
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what evaluated code prints is no answer
  if sys.platform == 'linux':  # elsewhere it may be refused
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  import reasoning_gym

  for line in sys.stdin.buffer:
    out.write(json.dumps(_forked(reasoning_gym, json.loads(line), seconds)).encode() + b'\n')
    out.flush()


def _forked(gym: Any, asked: Mapping[str, Any], seconds: float) -> dict[str, Any]:
  """Scores in a fork, which is killed when its time is over."""
  reading, writing = os.pipe()
  child = os.fork()
  if not child:
    with contextlib.suppress(BaseException):
      try:
        give_up()
        found = _score(gym, asked)
      except (OSError, KeyError) as error:
        found = {'refused': f'this machine cannot cut a process off the network: {error}'}
      os.write(writing, json.dumps(found).encode() + b'\n')
    os._exit(0)
  os.close(writing)
  with os.fdopen(reading, 'rb', 0) as file:
    said = _line(file, seconds)
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return said or {'score': 0.0}


def _score(gym: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
  try:
    dataset = gym.create_dataset(asked['family'], size=1, seed=0)
  except (ValueError, TypeError, AssertionError) as error:
    return {'refused': f'reasoning_gym cannot make {asked["family"]} ({error})'}
  try:
    return {'score': float(dataset.score_answer(asked['answer'], asked['entry']))}
  except KeyError as error:
    return {'refused': f'the metadata lacks {error}'}
  except Exception:  # whatever an answer makes of a family's parser
    return {'score': 0.0}


def give_up() -> None:
  """No sockets, programs, processes or signals to others from here on, for this process.

  Raises:
    OSError: the kernel refuses the filter.
    KeyError: a machine whose system calls are not listed here.
  """
  if sys.platform != 'linux':
    return
  machine, refused = _SYSCALLS[platform.machine()]
  refused += _EVERYWHERE
  # A program of the kernel's packet filter: (code, how far to jump if it holds, if not, number).
  load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
  allow, deny, kill = 0x7FFF0000, 0x00050001, 0x80000000  # the second is EPERM
  n = len(refused)
  steps = [
    (load, 0, 0, 4),  # the machine's name
    (equal, 1, 0, machine),
    (end, 0, 0, kill),
    (load, 0, 0, 0),  # the number of the call
    (at_least, n + 1, 0, 0x40000000),  # other conventions of calling
    *((equal, n - i, 0, number) for i, number in enumerate(refused)),
    (end, 0, 0, allow),
    (end, 0, 0, deny),
  ]
  code = ctypes.create_string_buffer(b''.join(struct.pack('=HBBI', *step) for step in steps))
  program = struct.pack('HP', len(steps), ctypes.addressof(code))
  libc = ctypes.CDLL(None, use_errno=True)
  no_new_privileges, set_filter, filtered = 38, 22, 2
  if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_filter, filtered, program):
    raise OSError(ctypes.get_errno(), 'the kernel takes no filter')


if __name__ == '__main__':
  serve(float(sys.argv[1]))
