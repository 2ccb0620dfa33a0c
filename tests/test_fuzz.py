"""Every reader on damaged input: a value, or a `UserError` of one sentence, and nothing else.

`python -m pytest tests/test_fuzz.py -m slow` tries five times as many inputs.
"""

import functools
import io
import json
import pathlib
import random
import shutil
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dopd_jax import checkpoint, models, policies, report, tasks, workdirs
from dopd_jax import config as configs
from dopd_jax.data import open_source, parse_record, read_image
from dopd_jax.data.image_processor import ImageProcessor
from dopd_jax.data.images import image_size
from dopd_jax.data.sources import write_array_record
from dopd_jax.errors import UserError
from tests import mutants, pairs

ROW = {
  'id': 'a',
  'prompt': [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Which?'}]}],
  'privileged_context': 'think',
  'completion': 'one',
  'answer': '1',
  'verifier': 'exact',
  'teacher': 'math',
  'images': ['a.png'],
  'boxes': [[1, 2, 9, 9]],
  'labels': ['dog'],
  'caption': 'a dog',
  'box_format': 'absolute',
}
PICTURES = ('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM')
TEXT_ROW = {'id': 'b', 'prompt': 'What?', 'privileged_context': 'x', 'answer': 1, 'more': [1, {}]}


def as_json(value):
  return json.dumps(value).encode()


def picture(kind):
  file = io.BytesIO()
  Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(file, kind)
  return file.getvalue()


@functools.cache
def model():
  """A whole model directory: one layer, 16 wide."""
  return pathlib.Path(pairs.pair()[0])


def copied(path):
  shutil.copytree(model(), path)
  return path


class Reader(NamedTuple):
  """Good input, what reads it in a folder, how many damaged copies are tried, and their kind."""

  data: Any
  read: Callable[[pathlib.Path, Any], Any]
  count: int
  mutate: Callable[[Any, random.Random], Any] = mutants.of_bytes


def records_file(name):
  def read(folder, data):
    path = folder / name
    path.write_bytes(data)
    (folder / 'a.png').write_bytes(picture('PNG'))
    for record in open_source(str(path)):
      assert record.prompt

  return read


def in_model(name, reader):
  """Reads a model directory in which one file is damaged."""

  def read(folder, data):
    directory = folder / 'model'
    if not directory.exists():
      copied(directory)
    (directory / name).write_bytes(data)
    return reader(directory)

  return read


def parquet_bytes():
  import pyarrow
  import pyarrow.parquet

  file = io.BytesIO()
  pyarrow.parquet.write_table(
    pyarrow.Table.from_pylist(
      [{'prompt': str(i), 'privileged_context': 'x', 'answer': 1} for i in range(3)]
    ),
    file,
  )
  return file.getvalue()


def array_record_bytes(path):
  write_array_record([TEXT_ROW, {**TEXT_ROW, 'id': 'c'}], str(path))
  return path.read_bytes()


def gguf_bytes(path):
  from tests.models import test_gguf, tiny

  peer = tiny.torch_model('llama', vocab_size=len(test_gguf.VOCAB), num_hidden_layers=1)
  return test_gguf.write(path, peer).read_bytes()


def read_gguf(folder, data):
  from dopd_jax.models import gguf

  (folder / 'x.gguf').write_bytes(data)
  gguf.load(folder / 'x.gguf')


def read_images(folder, data):
  read_image(data)
  image_size({'bytes': data, 'path': None})


def read_metrics(folder, data):
  path = folder / 'metrics.jsonl'
  path.write_bytes(data)
  rows = report.read_metrics(path)
  report.summary_table(rows)
  if rows and zlib.crc32(data) % 50 == 0:  # drawing takes its time
    report.write_report(path, folder / 'x.png')


METRICS = b''.join(
  as_json({'step': s, 'train/loss': 0.1 * s, 'eval/accuracy': 0.5, 'train/entropy/S': None}) + b'\n'
  for s in range(4)
)


def read_workdir(folder, data):
  (folder / 'config.json').write_bytes(data)
  workdirs.read_config(str(folder))
  workdirs.check(str(folder), configs.validate(pairs.config()))


def saved(directory):
  """A checkpoint, and the content of two of its files."""
  saves = checkpoint.Checkpoints(str(directory))
  saves.save(3, {'x': jnp.ones(3)}, {'metrics': {'eval/accuracy': 0.5}})
  saves.wait()
  return [(directory / '00000003' / name).read_bytes() for name in ('manifest.json', 'run.json')]


def read_checkpoint(source, name):
  def read(folder, data):
    root = folder / 'checkpoints'
    if not root.exists():
      shutil.copytree(source, root)
    (root / '00000003' / name).write_bytes(data)
    saves = checkpoint.Checkpoints(str(root), best='eval/accuracy')
    saves.best_step()
    saves.newest()

  return read


def read_generation(directory):
  import jax

  from dopd_jax import sharding
  from dopd_jax.rollout import Sampling, sampling_notes

  config = configs.validate(pairs.config(student__path=str(directory)))
  pair = policies.load_pair(config, sharding.make_mesh(1, -1, 1))
  sampling_notes(pair.student.generation_config, Sampling(max_new_tokens=4))
  assert jax.devices()


@pytest.fixture(scope='module')
def readers(tmp_path_factory):
  tmp_path = tmp_path_factory.mktemp('good')
  file = lambda name: (model() / name).read_bytes()
  manifest, run = saved(tmp_path / 'saved')
  processor = as_json({'size': {'shortest_edge': 1024, 'longest_edge': 8192}, 'patch_size': 16})
  config = as_json({'config': pairs.config().to_dict()})
  row = {k: v for k, v in ROW.items() if k != 'images'} | {'images': [picture('PNG')]}
  return {
    'jsonl': Reader(
      as_json(TEXT_ROW) + b'\n' + as_json({**TEXT_ROW, 'id': 'c'}),
      records_file('rows.jsonl'),
      400,
    ),
    'row': Reader(ROW, lambda f, r: parse_record(r, 'here', default_id='x'), 2000, mutants.of_json),
    'pictured row': Reader(
      row, lambda f, r: parse_record(r, 'here', default_id='x'), 500, mutants.of_json
    ),
    'jsonl of odd rows': Reader(
      [ROW, TEXT_ROW],
      lambda f, rows: records_file('r.jsonl')(
        f, b'\n'.join(map(as_json, rows)) if isinstance(rows, list) else b''
      ),
      300,
      mutants.of_json,
    ),
    'parquet': Reader(parquet_bytes(), records_file('rows.parquet'), 200),
    'array_record': Reader(
      array_record_bytes(tmp_path / 'x.array_record'), records_file('rows.array_record'), 100
    ),
    **{kind: Reader(picture(kind), read_images, 150) for kind in PICTURES},
    'safetensors': Reader(
      file('model.safetensors'), in_model('model.safetensors', models.load), 60
    ),
    'gguf': Reader(gguf_bytes(tmp_path / 'x.gguf'), read_gguf, 60),
    'config.json': Reader(
      file('config.json'), in_model('config.json', models.weights.read_config), 300
    ),
    'config.json, values': Reader(
      json.loads(file('config.json')),
      lambda f, v: in_model('config.json', models.weights.read_config)(f, as_json(v)),
      1000,
      mutants.of_json,
    ),
    'config.json, loaded': Reader(
      json.loads(file('config.json')),
      lambda f, v: in_model('config.json', models.load)(f, as_json(v)),
      60,
      mutants.of_json,
    ),
    'index': Reader(
      {'metadata': {}, 'weight_map': {'model.embed_tokens.weight': 'model.safetensors'}},
      lambda f, v: in_model('model.safetensors.index.json', models.load)(f, as_json(v)),
      60,
      mutants.of_json,
    ),
    'tokenizer': Reader(
      file('tokenizer.json'), in_model('tokenizer.json', policies.load_tokenizer), 40
    ),
    'generation_config.json': Reader(
      json.loads(file('generation_config.json')) | {'temperature': 0.7, 'eos_token_id': [1, 2]},
      lambda f, v: in_model('generation_config.json', read_generation)(f, as_json(v)),
      25,
      mutants.of_json,
    ),
    'image processor': Reader(
      json.loads(processor),
      lambda f, v: in_model(
        'preprocessor_config.json', lambda d: ImageProcessor.from_directory(str(d))
      )(f, as_json(v)),
      200,
      mutants.of_json,
    ),
    'config of a run': Reader(
      json.loads(config), lambda f, v: read_workdir(f, as_json(v)), 500, mutants.of_json
    ),
    'config of a run, bytes': Reader(config, read_workdir, 100),
    'metrics': Reader(METRICS, read_metrics, 150),
    'metrics, values': Reader(
      [json.loads(line) for line in METRICS.splitlines()],
      lambda f, v: read_metrics(f, b'\n'.join(map(as_json, v)) if isinstance(v, list) else b''),
      300,
      mutants.of_json,
    ),
    'manifest': Reader(manifest, read_checkpoint(tmp_path / 'saved', 'manifest.json'), 100),
    'run.json': Reader(run, read_checkpoint(tmp_path / 'saved', 'run.json'), 100),
    'task': Reader(
      b'plan_execute?size=3&seed=0&steps=2&definitions=4&modulus=7',
      lambda f, b: tasks.load(b.decode('latin1')),
      200,
    ),
  }


NAMES = (
  *(
    'jsonl',
    'row',
    'pictured row',
    'jsonl of odd rows',
    'parquet',
    'array_record',
    'safetensors',
    'gguf',
    'config.json',
    'config.json, values',
    'config.json, loaded',
    'index',
    'tokenizer',
    'generation_config.json',
    'image processor',
    'config of a run',
    'config of a run, bytes',
    'metrics',
    'metrics, values',
    'manifest',
    'run.json',
    'task',
  ),
  *PICTURES,
)


def fuzz(reader, folder, name, times):
  rng = random.Random(zlib.crc32(name.encode()))
  reader.read(folder, reader.data)  # so that what follows is damage
  for number in range(times * reader.count):
    given = reader.mutate(reader.data, rng)
    try:
      reader.read(folder, given)
    except UserError as error:
      sentence = str(error)
      assert sentence.strip() and len(sentence) < 3000 and '\n' not in sentence, sentence
    except Exception as error:
      raise AssertionError(
        f'{name}, input {number}: {type(error).__name__}: {error}\n{given!r:.2000}'
      ) from error


@pytest.mark.parametrize('name', NAMES)
def test_damaged_input_gets_a_sentence(readers, tmp_path, name):
  assert readers.keys() == set(NAMES)
  fuzz(readers[name], tmp_path, name, 1)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_much_damaged_input_gets_a_sentence(readers, tmp_path, name):
  fuzz(readers[name], tmp_path, f'{name} again', 5)
