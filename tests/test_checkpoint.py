import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import checkpoint, sharding
from dopd_jax.errors import UserError


def state(value=1.0):
  return {'params': {'embedding': jnp.full((8, 16), value)}, 'step': jnp.int32(value)}


def like(tree, mesh=None):
  where = lambda x: sharding.rows(mesh) if mesh and x.ndim else x.sharding
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), tree)


def save(saves, step, **metrics):
  saves.save(step, state(step), {'data': {'batches': step}, 'metrics': metrics})
  saves.wait()


def test_round_trip_onto_another_mesh(tmp_path):
  saves = checkpoint.Checkpoints(str(tmp_path / 'c'))
  save(saves, 3, a=0.5)
  mesh = sharding.make_mesh(4, 2, 1)
  got, run = saves.restore(3, like(state(), mesh))
  np.testing.assert_array_equal(got['params']['embedding'], state(3)['params']['embedding'])
  assert got['params']['embedding'].sharding == sharding.rows(mesh)
  assert run == {'step': 3, 'data': {'batches': 3}, 'metrics': {'a': 0.5}}


def test_keeps_the_last_and_the_best(tmp_path):
  saves = checkpoint.Checkpoints(str(tmp_path), keep=2, best='eval/accuracy')
  for step, accuracy in enumerate([0.2, 0.9, 0.3, 0.4, 0.5], 1):
    save(saves, step, **{'eval/accuracy': accuracy})
  assert saves.steps() == [2, 4, 5] and saves.best_step() == 2
  lower = checkpoint.Checkpoints(str(tmp_path), keep=1, best='eval/accuracy', lower_is_better=True)
  assert lower.best_step() == 4


def test_unfinished_saves_are_never_read(tmp_path):
  saves = checkpoint.Checkpoints(str(tmp_path))
  save(saves, 1)
  save(saves, 2)
  os.unlink(tmp_path / '00000002' / 'manifest.json')
  assert saves.steps() == [1]
  save(saves, 2)  # and the number can be used again
  assert saves.steps() == [1, 2]


def test_the_old_one_goes_only_after_the_new_one_is_committed(tmp_path, monkeypatch):
  saves = checkpoint.Checkpoints(str(tmp_path), keep=1)
  save(saves, 1)
  seen, original, gate = [], checkpoint._write, threading.Event()

  def slow(path, text):
    if path.name == 'manifest.json':
      gate.wait(10)
      seen.append(saves.steps())
    original(path, text)

  monkeypatch.setattr(checkpoint, '_write', slow)
  saves.save(2, state(2), {'data': {}, 'metrics': {}})
  assert saves.steps() == [1]
  gate.set()
  saves.wait()
  assert seen == [[1]] and saves.steps() == [2]


@pytest.mark.parametrize('how', ['flip', 'remove'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, how):
  saves = checkpoint.Checkpoints(str(tmp_path))
  save(saves, 1)
  manifest = json.loads((tmp_path / '00000001' / 'manifest.json').read_text())
  name = max(manifest['files'], key=lambda n: (tmp_path / '00000001' / n).stat().st_size)
  path = tmp_path / '00000001' / name
  if how == 'remove':
    path.unlink()
  else:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
  with pytest.raises(UserError, match=f'damaged.*{name}'):
    saves.restore(1, like(state()))


def harm(directory, step, name='run.json', content=b'{}'):
  (directory / f'{step:08d}' / name).write_bytes(content)


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(tmp_path, caplog):
  saves = checkpoint.Checkpoints(str(tmp_path), keep=3)
  for step in (1, 2, 3):
    save(saves, step)
  harm(tmp_path, 3)
  harm(tmp_path, 2, 'manifest.json', b'')
  before = sorted(p.read_bytes() for p in tmp_path.rglob('*') if p.is_file())
  with caplog.at_level('WARNING'):
    assert saves.newest() == 1
  assert '00000003 is damaged (run.json' in caplog.text and 'step 1 is whole' in caplog.text
  assert sorted(p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()) == before
  assert saves.restore(1, like(state()))[1]['step'] == 1 and saves.steps() == [1]


def test_damaged_checkpoints_do_not_drive_out_whole_ones(tmp_path):
  """The one that a run goes on from stays until a newer one is whole, whatever `keep` is."""
  first = checkpoint.Checkpoints(str(tmp_path), keep=2)
  save(first, 1)
  save(first, 4)
  harm(tmp_path, 4)
  saves = checkpoint.Checkpoints(str(tmp_path), keep=1)
  assert saves.newest() == 1
  save(saves, 2)
  assert saves.steps() == [2]
  save(saves, 4)  # takes the place of the damaged one
  assert checkpoint.Checkpoints(str(tmp_path)).newest() == 4


def test_if_every_checkpoint_is_damaged_the_run_does_not_begin_anew(tmp_path):
  saves = checkpoint.Checkpoints(str(tmp_path))
  assert saves.newest() is None
  for step in (1, 2):
    save(saves, step)
    harm(tmp_path, step)
  with pytest.raises(UserError, match=r'00000002 is damaged.*none before it is whole'):
    saves.newest()


@pytest.mark.parametrize(
  'text', ['', '[]', '3', '{"files": 3}', '{"files": {}}', '\xff', '[' * 9999]
)
def test_a_manifest_that_is_none(tmp_path, text):
  saves = checkpoint.Checkpoints(str(tmp_path), best='eval/accuracy')
  save(saves, 1)
  harm(tmp_path, 1, 'manifest.json', text.encode('latin1'))
  harm(tmp_path, 1, 'run.json', text.encode('latin1'))
  assert saves.best_step() is None
  with pytest.raises(UserError, match='damaged'):
    saves.restore(1, like(state()))
  with pytest.raises(UserError, match='damaged'):
    saves.newest()


def test_another_models_checkpoint(tmp_path):
  saves = checkpoint.Checkpoints(str(tmp_path))
  save(saves, 1)
  other = like({'params': {'lm_head': jnp.zeros((8, 16))}, 'step': jnp.int32(0)})
  with pytest.raises(UserError, match='another model'):
    saves.restore(1, other)
  wider = like({'params': {'embedding': jnp.zeros((8, 32))}, 'step': jnp.int32(0)})
  with pytest.raises(UserError, match='another model'):
    saves.restore(1, wider)


def test_a_failed_save_is_told_and_loses_nothing(tmp_path, monkeypatch):
  saves = checkpoint.Checkpoints(str(tmp_path), keep=1)
  save(saves, 1)

  def full(path, text):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint, '_write', full)
  saves.save(2, state(2), {'data': {}, 'metrics': {}})
  with pytest.raises(
    UserError, match=r'step 2 could not be saved.*No space left.*good one is step 1'
  ):
    saves.wait()
  assert saves.steps() == [1]
  got, _ = saves.restore(1, like(state()))
  assert got['step'] == 1


def test_a_relative_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  saves = checkpoint.Checkpoints('runs/checkpoints')
  save(saves, 1)
  got, _ = saves.restore(1, like(state()))
  assert got['step'] == 1 and (tmp_path / 'runs' / 'checkpoints' / '00000001').exists()
