"""Which code a result was made with."""

import contextlib
import subprocess

from experiments.grid import ROOT


def current() -> str:
  """The commit of the code, with `-dirty` behind it where files differ; '' without git."""
  # A grid that writes its results must not wait for, or take, the index of the user's git.
  words = ['git', '--no-optional-locks', 'describe', '--always', '--dirty', '--abbrev=40']
  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    told = subprocess.run(
      [*words, '--exclude=*'], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return told.stdout.strip()
  return ''
