"""The notebooks: they run, they were stored with what they show, and their badges lead to them."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from dopd_jax import REPOSITORY
from experiments import common

COLAB = pathlib.Path(__file__).parent.parent / 'colab'
NOTEBOOKS = sorted(path.name for path in COLAB.glob('*.ipynb'))


def cells(name, kind):
  return [c for c in nbformat.read(COLAB / name, 4).cells if c.cell_type == kind]


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_runs(name, monkeypatch):
  """In its quick form: few steps, few problems."""
  quick = {'DOPD_JAX_QUICK': '1', 'JAX_PLATFORMS': 'cpu'}
  for variable, value in (quick | common.fast_compilation()).items():
    monkeypatch.setenv(variable, value)
  notebook = nbformat.read(COLAB / name, 4)
  where = {'metadata': {'path': str(COLAB)}}
  NotebookClient(notebook, timeout=300, kernel_name='python3', resources=where).execute()
  # A shell command that fails is no error of its cell.
  said = [o.text for c in notebook.cells for o in c.get('outputs', []) if 'text' in o]
  assert not [text for text in said if 'Traceback' in text or 'error:' in text]


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_is_stored_as_it_ran(name):
  title, *_ = cells(name, 'markdown')
  path = REPOSITORY.removeprefix('https://github.com/')
  assert f'https://colab.research.google.com/github/{path}/blob/main/colab/{name}' in title.source
  first, *rest = cells(name, 'code')
  assert f'git clone -q {REPOSITORY}' in first.source and 'pip install' in first.source
  counts = [c.execution_count for c in (first, *rest)]
  assert counts == list(range(1, len(counts) + 1))
  outputs = [o for c in rest for o in c.outputs]
  assert outputs and not [o for o in outputs if o.output_type == 'error']
  assert os.path.getsize(COLAB / name) < 1_000_000
