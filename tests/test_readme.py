"""What the README says exists and runs."""

import importlib.util
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np

import dopd_jax
from dopd_jax import data, tasks

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_the_repositorys_address_is_the_constant():
  addresses = re.findall(r'https://github\.com/[\w./-]+', README)
  assert addresses and set(addresses) == {dopd_jax.REPOSITORY}


def test_commands_configs_and_links_exist():
  for name in re.findall(r'python -m dopd_jax\.(\w+)', README):
    assert (ROOT / 'dopd_jax' / f'{name}.py').exists(), name
  paths = re.findall(r'(?:configs|docs|experiments|tests|dopd_jax)/[\w/.-]+\w', README)
  for path in {*paths, *re.findall(r'\]\(([\w/.-]+)\)', README)}:
    assert (ROOT / path).exists(), path


def test_no_file_names_a_place_on_one_machine():
  """Notebooks keep what they printed, and results what a run said."""
  place = re.compile(r'/(tmp|home|root|Users|work)/\w')
  found = []
  for suffix in ('md', 'py', 'json', 'ipynb', 'toml', 'txt', 'html'):
    for path in ROOT.rglob(f'*.{suffix}'):
      inside = path.relative_to(ROOT).parts
      if inside[0].startswith('.') or inside[0] in ('runs', 'build'):
        continue
      text = re.sub(r'"image/png": "[^"]*"', '', path.read_text())  # base64 has slashes too
      found += [f'{path.name}: {line[:80]}' for line in text.splitlines() if place.search(line)]
  assert not found


def test_the_library_snippet_runs():
  (snippet,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  z = np.random.default_rng(0).normal(size=(3, 2, 4, 200)).astype(np.float32)
  names = dict(zip(('student', 'privileged_student', 'privileged_teacher'), map(jnp.asarray, z)))
  names |= {'tokens': jnp.zeros((2, 4), jnp.int32), 'mask': jnp.ones((2, 4), bool)}
  exec(snippet, names)
  assert names['loss'] > 0 and names['grad'].shape == (2, 4, 200)


def test_the_example_record_is_one():
  (line,) = re.findall(r'```json\n(.*?)\n```', README, re.DOTALL)
  record = data.parse_record(json.loads(line), 'README', default_id='x')
  assert tasks.verify(record, 'The answer is 27') == 1.0
  assert tasks.verify(record, 'The answer is 28') == 0.0


def test_the_table_of_methods_is_that_of_the_code():
  spec = importlib.util.spec_from_file_location('methods', ROOT / 'docs' / 'methods.py')
  methods = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(methods)
  assert methods.PAGE.read_text() == methods.page(), 'run python docs/methods.py'


def test_the_record_of_an_image_is_one():
  page = (ROOT / 'docs' / 'images.md').read_text()
  (line,) = re.findall(r'```json\n(.*?)\n```', page, re.DOTALL)
  record = data.parse_record(
    json.loads(line), 'images.md', default_id='x', privileged_kind='box+label'
  )
  assert record.boxes == ((112.0, 40.0, 530.0, 640.0),) and record.labels == ('dog',)
  for path in re.findall(r'\]\(([\w/.-]+)\)', page):
    assert (ROOT / 'docs' / path).exists(), path
