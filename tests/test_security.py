"""What a downloaded file may make this package do: be read, and nothing else."""

import ast
import pathlib

import pytest

import dopd_jax
from dopd_jax import models, report
from dopd_jax.errors import UserError
from tests import pairs
from tests.test_train import run

FILES = sorted(pathlib.Path(dopd_jax.__file__).parent.rglob('*.py'))
# Modules that build objects of any kind from a file, or run programs.
BANNED = {
  'pickle',
  'cPickle',
  'dill',
  'cloudpickle',
  'joblib',
  'shelve',
  'marshal',
  'yaml',
  'torch',
}
CALLS = {'eval', 'exec', 'compile', '__import__'}
PROCESSES = {'subprocess', 'multiprocessing'}


def sins(source):
  """What a module does that no reader of downloads may; lines with their words."""
  found = []
  for node in ast.walk(ast.parse(source)):
    names = [node.module or ''] if isinstance(node, ast.ImportFrom) else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    found += [(node.lineno, n) for n in names if n.split('.')[0] in BANNED | PROCESSES]
    if not isinstance(node, ast.Call):
      continue
    called = ast.unparse(node.func)
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    bad = called in CALLS or called.endswith(('.system', '.popen', 'read_pickle'))
    bad |= called.endswith(('np.load', 'numpy.load', 'fromfile')) or 'allow_pickle' in given
    bad |= called.startswith('Auto') and given.get('trust_remote_code') != 'False'
    bad |= '.Auto' in called and given.get('trust_remote_code') != 'False'
    bad |= given.get('trust_remote_code', 'False') != 'False'
    if bad:
      found.append((node.lineno, called))
  return found


def test_nothing_here_builds_objects_from_downloads():
  found = {path.name: sins(path.read_text()) for path in FILES}
  assert len(found) > 50
  # The one process that is started: the one which scores answers, with its limits.
  assert [name for _, name in found.pop('judge.py')] == ['subprocess']
  assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
  'source',
  [
    'import pickle',
    'from torch import load',
    'import numpy as np\nnp.load("x", allow_pickle=True)',
    'eval("1")',
    'import os\nos.system("x")',
    'transformers.AutoTokenizer.from_pretrained("x")',
    'AutoModel.from_pretrained("x", trust_remote_code=True)',
  ],
)
def test_the_search_finds_what_it_looks_for(source):
  assert sins(source)


def test_code_beside_a_tokenizer_does_not_run(tmp_path):
  """A directory that asks for its own tokenizer class, as remote code does."""
  import json
  import shutil

  from dopd_jax import policies

  directory = tmp_path / 'model'
  shutil.copytree(pairs.pair()[0], directory)
  (directory / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\nclass Evil: pass')
  file = directory / 'tokenizer_config.json'
  settings = json.loads(file.read_text())
  settings |= {'auto_map': {'AutoTokenizer': ['evil.Evil', 'evil.Evil']}, 'tokenizer_class': 'Evil'}
  file.write_text(json.dumps(settings))
  try:
    policies.load_tokenizer(directory)
  except UserError as error:
    assert 'tokenizer' in str(error)
  assert not (tmp_path / 'ran').exists()


def test_weights_that_are_pickles_are_not_read(tmp_path):
  import shutil

  directory = tmp_path / 'model'
  shutil.copytree(pairs.pair()[0], directory)
  (directory / 'model.safetensors').rename(directory / 'pytorch_model.bin')
  with pytest.raises(UserError, match=r'model\.safetensors does not exist'):
    models.load(directory)


def test_an_index_names_no_file_outside_of_the_model(tmp_path):
  import json
  import shutil

  directory = tmp_path / 'model'
  shutil.copytree(pairs.pair()[0], directory)
  shutil.move(directory / 'model.safetensors', tmp_path / 'other.safetensors')
  for name in ('../other.safetensors', str(tmp_path / 'other.safetensors')):
    listed = {'weight_map': {'model.norm.weight': name}}
    (directory / 'model.safetensors.index.json').write_text(json.dumps(listed))
    with pytest.raises(UserError, match='does not name files of its folder'):
      models.load(directory)


def test_a_token_of_the_hub_is_in_no_file_and_no_message(tmp_path, monkeypatch, caplog, capfd):
  secret = 'hf_' + 'Zq7' * 11
  for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY'):
    monkeypatch.setenv(name, secret)
  with caplog.at_level('INFO'):
    run(tmp_path / 'run', steps=1, checkpoint__every=1)
    with pytest.raises(UserError) as missing:
      models.load('someone/private')
  assert len(report.read_metrics(tmp_path / 'run' / 'metrics.jsonl')) == 2
  said = capfd.readouterr()
  for text in (caplog.text, str(missing.value), said.out, said.err):
    assert secret not in text
  files = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert len(files) > 5
  assert not [path for path in files if secret.encode() in path.read_bytes()]
