"""Who may import whom. The house stays a house only while a test says so."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / 'dopd_jax'
COMMANDS = {p.stem for p in ROOT.glob('*.py') if "if __name__ == '__main__'" in p.read_text()}
ALLOWED = {  # room -> the rooms that it may import from, beside itself and `errors`
  'losses': set(),
  'models': {'sharding'},
  'data': set(),
  'tasks': set(),
  'rollout': {'sharding'},
  'objectives': {'losses', 'config'},
}


def imported_rooms(path):
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      names = [node.module, *(f'{node.module}.{a.name}' for a in node.names)]
    for name in names:
      parts = name.split('.')
      if parts[0] == 'dopd_jax' and len(parts) > 1:
        yield parts[1]


@pytest.mark.parametrize('room', ALLOWED)
def test_rooms_keep_to_themselves(room):
  for path in (ROOT / room).rglob('*.py'):
    allowed = ALLOWED[room] | {room} | ({'errors'} if room != 'losses' else set())
    # `from dopd_jax import x` names a room; names defined in the package itself are no room.
    rooms = {r for r in imported_rooms(path) if (ROOT / r).exists() or (ROOT / f'{r}.py').exists()}
    assert rooms <= allowed, f'{path} imports {rooms - allowed}'


def test_nothing_imports_a_command():
  for path in ROOT.rglob('*.py'):
    if path.stem in COMMANDS and path.parent == ROOT:
      continue  # a command may share the main job with another
    assert not set(imported_rooms(path)) & COMMANDS, path


def test_losses_load_jax_alone():
  code = (
    'import sys, dopd_jax.losses\n'
    'heavy = {"flax", "orbax", "grain", "transformers", "torch", "optax", "ml_collections"}\n'
    'assert not heavy & set(sys.modules), heavy & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_no_tensorflow_and_no_torch():
  for path in ROOT.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      modules = []
      if isinstance(node, ast.Import):
        modules = [a.name for a in node.names]
      elif isinstance(node, ast.ImportFrom):
        modules = [node.module or '']
      assert not {m.split('.')[0] for m in modules} & {'tensorflow', 'torch'}, path
