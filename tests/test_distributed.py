"""Several processes: detected where there are some, the numbers of one, and a common end."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dopd_jax import checkpoint, cli, distributed, policies, report, sharding
from dopd_jax.config import Policy
from dopd_jax.errors import SaveFailed, UserError
from tests import test_commands

# ----------------------------------------------------------------- detection
SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '4',
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_STEP_TASKS_PER_NODE': '2(x2)',
  'SLURM_PROCID': '3',
  'SLURM_LOCALID': '1',
  'SLURM_NODEID': '1',
}
BY_HAND = {
  'JAX_COORDINATOR_ADDRESS': 'host:1234',
  'JAX_NUM_PROCESSES': '2',
  'JAX_PROCESS_ID': '1',
}
OMPI = {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:2', 'OMPI_COMM_WORLD_SIZE': '2'}
ENDPOINTS = {'worker-network-endpoints': 'a:b:10.0.0.1,a:b:10.0.0.2', 'tpu-env': ''}


def no_network(key):
  raise AssertionError(f'asked for {key}')


@pytest.mark.parametrize(
  'environ',
  [
    {},
    {'JAX_NUM_PROCESSES': '1', **SLURM},
    BY_HAND | {'JAX_NUM_PROCESSES': '1'},
    SLURM | {'SLURM_STEP_NUM_TASKS': '1'},  # one task; an interactive shell in a job of four
    {k: v for k, v in SLURM.items() if 'STEP' not in k},  # a batch script, before any srun
    OMPI | {'OMPI_COMM_WORLD_SIZE': '1'},
    {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
  ],
)
def test_one_machine_is_left_alone(environ):
  assert distributed.detect(environ, '', no_network) is None


def test_a_tpu_vm_of_one_host_is_left_alone():
  for hosts in ('10.0.0.1', ''):
    metadata = {'worker-network-endpoints': hosts, 'tpu-env': "ZONE: 'x'"}
    assert distributed.detect({}, 'tpu,cpu', metadata.__getitem__) is None
  assert distributed.detect({'TPU_WORKER_HOSTNAMES': 'localhost'}, 'tpu,cpu', no_network) is None
  assert distributed.detect({'TPU_SKIP_MDS_QUERY': '1'}, 'tpu,cpu', no_network) is None
  assert distributed.detect({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'cpu', no_network) is None


@pytest.mark.parametrize(
  'environ, platforms, metadata, processes, arguments',
  [
    (BY_HAND, '', {}, 2, {'coordinator_address': 'host:1234', 'process_id': 1}),
    (BY_HAND | SLURM, '', {}, 2, {'cluster_detection_method': 'deactivate'}),
    (SLURM, '', {}, 4, {'process_id': 3, 'local_device_ids': None}),
    (SLURM | {'JAX_COORDINATOR_ADDRESS': 'node1:99'}, '', {}, 4, {'num_processes': 4}),
    (OMPI, '', {}, 2, {'cluster_detection_method': 'ompi'}),
    ({'TPU_WORKER_HOSTNAMES': 'a,b,c,d'}, 'tpu', {}, 4, {'cluster_detection_method': 'gketpu'}),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, 'tpu', {}, 2, {}),
    ({}, 'tpu,cpu', ENDPOINTS, 2, {'cluster_detection_method': 'gcetpu'}),
    ({}, 'tpu,cpu', ENDPOINTS | {'tpu-env': "A: '1'\nMEGASCALE_NUM_SLICES: '3'"}, 6, {}),
  ],
)
def test_clusters(environ, platforms, metadata, processes, arguments):
  found = distributed.detect(environ, platforms, metadata.__getitem__)
  assert found and found.processes == processes
  assert arguments.items() <= found.arguments.items()


@pytest.mark.parametrize(
  'gpus, on_node, tasks_per_node, own',
  [
    ('0,1,2,3,4,5,6,7', '8', '1(x2)', [0, 1, 2, 3, 4, 5, 6, 7]),  # one task takes all
    ('0,1', '2', '2(x2)', [1]),  # one each
    ('0,1,2,3', '4', '1,2', [2, 3]),
    ('0', '2', '2(x2)', [0]),  # Slurm shows each task its own
    ('2,3', '4', '2(x2)', [0, 1]),
  ],
)
def test_a_slurm_task_takes_its_own_gpus(gpus, on_node, tasks_per_node, own):
  environ = SLURM | {'CUDA_VISIBLE_DEVICES': gpus, 'SLURM_GPUS_ON_NODE': on_node}
  environ |= {'SLURM_STEP_TASKS_PER_NODE': tasks_per_node}
  environ |= {'SLURM_LOCALID': '0'} if tasks_per_node.startswith('1(') else {}
  assert distributed.detect(environ).arguments['local_device_ids'] == own


@pytest.mark.parametrize(
  'environ, words',
  [
    ({'JAX_PROCESS_ID': '1'}, 'JAX_COORDINATOR_ADDRESS is not set and JAX_PROCESS_ID is'),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, 'JAX_NUM_PROCESSES is not set'),
    (BY_HAND | {'JAX_PROCESS_ID': '2'}, 'number the processes from 0'),
    (BY_HAND | {'JAX_PROCESS_ID': 'x'}, "JAX_PROCESS_ID must be a whole number, not 'x'"),
    (BY_HAND | {'JAX_COORDINATOR_ADDRESS': 'host'}, 'HOST:PORT'),
  ],
)
def test_half_an_environment_is_an_error(environ, words):
  with pytest.raises(UserError, match=words):
    distributed.detect(environ)


def test_a_command_for_one_process_says_so(monkeypatch):
  for name, value in BY_HAND.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match='runs on one process, and host:1234 has 2 here'):
    distributed.start(several=False)
  monkeypatch.setenv('DOPD_JAX_HEARTBEAT_SECONDS', '0')
  with pytest.raises(UserError, match='DOPD_JAX_HEARTBEAT_SECONDS must be'):
    distributed.start()


@pytest.mark.parametrize(
  'error, code, words',
  [
    (SaveFailed('the checkpoint could not be saved'), 1, 'stopped: another process of this run is'),
    (UserError('the model could not be fetched'), 2, 'error: the model could not be fetched'),
  ],
)
def test_a_save_that_waits_for_a_process_that_is_gone(monkeypatch, capsys, error, code, words):
  """Not the user's mistake, unlike whatever else the network cut off."""

  def main():
    raise error from RuntimeError('UNAVAILABLE: coordination service: Connection reset by peer')

  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(cli.distributed, 'start', lambda several: None)
  monkeypatch.setattr(os, '_exit', sys.exit)  # what ends at once must not end the tests
  with pytest.raises(SystemExit) as ended:
    cli._guarded(main)
  assert ended.value.code == code
  assert capsys.readouterr().err.startswith(words)


def test_two_processes_may_convert_one_file(monkeypatch, tmp_path):
  from dopd_jax.models import gguf

  monkeypatch.setattr(policies, 'CACHE', tmp_path / 'cache')
  (tmp_path / 'm.gguf').write_bytes(b'x')

  def slow(path, directory):
    """While this one converts, another process begins and ends."""
    monkeypatch.setattr(gguf, 'convert', fast)
    policies.locate(Policy(path=str(path)))
    fast(path, directory, 'slow')

  def fast(path, directory, whose='fast'):
    os.makedirs(directory)
    (pathlib.Path(directory) / 'whose').write_text(whose)

  monkeypatch.setattr(gguf, 'convert', slow)
  found = policies.locate(Policy(path=str(tmp_path / 'm.gguf')))
  assert (found / 'whose').read_text() == 'fast'
  assert [p.name for p in found.parent.iterdir()] == [found.name]  # nothing partial is left


# ----------------------------------------------------------------- real processes over loopback
SETTINGS = [
  '--config=configs/quickstart.py:smoke',
  '--config.steps=16',
  '--config.microbatch=8',
  '--config.checkpoint.every=4',
  '--config.evaluation.every=8',
  '--config.evaluation.records=21',  # chunks of 16 and 5: the last one is not full
  '--config.data.eval=task:plan_execute?steps=2&definitions=4&modulus=7&size=24&seed=8&split=test',
]


def start(command, count, devices=1, **env):
  """`count` processes of a command that know of each other; `devices` each."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  env = test_commands.ENV | {
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_ENABLE_COMPILATION_CACHE': 'false',  # programs of several CPU devices race from there
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
    'DOPD_JAX_START_SECONDS': '300',
    'DOPD_JAX_HEARTBEAT_SECONDS': '30',
    **env,
  }
  if count > 1:
    env |= {'JAX_COORDINATOR_ADDRESS': address, 'JAX_COORDINATOR_BIND_ADDRESS': address}
    env |= {'JAX_NUM_PROCESSES': str(count)}
  return [
    subprocess.Popen(
      command(i) if callable(command) else command,
      cwd=test_commands.ROOT,
      env=env | ({'JAX_PROCESS_ID': str(i)} if count > 1 else {}),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]


def ended(processes, codes):
  """(stdout, stderr) of each, once all have ended with these codes."""
  try:
    told = [p.communicate(timeout=900) for p in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == codes, [x[-2000:] for pair in told for x in pair]
  return told


def train(workdir, *more):
  return test_commands.command('train', *SETTINGS, f'--workdir={workdir}', *more)


def same_metrics(workdir, other):
  """To the rounding of another compilation; it came out bit for bit where this was written."""
  rows, wanted = (test_commands.metric_rows(x) for x in (workdir, other))
  assert [row.keys() for row in rows] == [row.keys() for row in wanted]
  for row, want in zip(rows, wanted):
    for name, value in want.items():
      np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """One process with two devices."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  ended(start(train(workdir), 1, devices=2), [0])
  return workdir


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """Two processes with a device each: the workdir, and what they said."""
  workdir = tmp_path_factory.mktemp('both') / 'run'
  return workdir, ended(start(train(workdir), 2), [0, 0])


ROWS = """
import json, jax, numpy as np
from dopd_jax import collate, distributed, sharding
distributed.start()
found = []
for sizes, order in (
  ((4, 1, 1), (0, 1, 2, 3)), ((4, 1, 1), (0, 2, 1, 3)), ((1, 2, 2), (0, 1, 2, 3)),
  ((1, 2, 2), (0, 2, 1, 3)), ((1, 1, 4), (0, 1, 2, 3)),
):
  mesh = sharding.make_mesh(*sizes, devices=[jax.devices()[i] for i in order])
  own = sharding.own_rows(mesh, 8)
  x = np.full((8, 3), -1, np.int32)
  x[own] = own[:, None]  # what the other process holds is not known here
  with jax.set_mesh(mesh):
    rows = collate.put(x, mesh)
    for layout in (sharding.rows(mesh), sharding.replicated(mesh)):
      again = jax.device_put(rows, layout)
      assert (collate.mine(again, mesh) == own[:, None]).all()
      assert (collate.fetch(again) == np.arange(8)[:, None]).all()
  found.append(own.tolist())
assert distributed.first(jax.process_index() + 5) == 5
print(json.dumps(found))
"""


@pytest.mark.slow
def test_rows_are_split_without_loss_or_overlap():
  """Two processes of two devices: in order, interleaved, and with the model over both of them."""
  told = ended(start([sys.executable, '-c', ROWS], 2, devices=2), [0, 0])
  first, second = (json.loads(out.splitlines()[-1]) for out, _ in told)
  everything = list(range(8))
  assert first == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 3], everything, everything]
  assert second == [[4, 5, 6, 7], [2, 3, 6, 7], [4, 5, 6, 7], everything, everything]


@pytest.mark.slow
def test_what_differs_between_processes_is_told_before_the_first_step(tmp_path):
  workdir = tmp_path / 'run'
  other = lambda i: train(workdir, f'--config.seed={i}')
  for _, errors in ended(start(other, 2), [2, 2]):
    assert 'error: process 1 has other settings than process 0' in errors
    assert 'Traceback' not in errors and 'Check failure' not in errors
  assert not workdir.exists()


@pytest.mark.slow
def test_a_process_whose_partner_never_comes_says_so(tmp_path):
  (first, second) = start(train(tmp_path), 2, DOPD_JAX_START_SECONDS='1')
  second.kill()
  ((_, errors), _) = ended([first, second], [2, -signal.SIGKILL])
  assert re.search(r'error: the 2 processes of 127\.0\.0\.1:\d+ did not meet within 1 s', errors)


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(alone, both):
  workdir, ((out, _), (other_out, other_err)) = both
  same_metrics(workdir, alone)
  last = test_commands.metric_rows(workdir)[-1]
  assert 0 < last['train/accuracy'] < 1 and 0 < last['eval/accuracy'] < 1  # rewards are known
  assert {n for n in last if 'share_right' in n} and {n for n in last if 'share_wrong' in n}
  assert (workdir / 'samples.html').read_text().count('plan_execute/') >= 16
  # One of them speaks and writes.
  assert 'step' in out and 'step' not in other_out
  assert 'Wrote' not in other_err
  assert len(list((workdir / 'tensorboard').iterdir())) == 1
  assert set(os.listdir(workdir)) == set(os.listdir(alone))


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 4, 8])
def test_a_checkpoint_of_two_processes_restores_on_other_meshes(alone, both, devices):
  mesh = sharding.make_mesh(1, -1, 1, devices=jax.devices()[:devices])
  read = lambda workdir: ocp.load(workdir / 'checkpoints' / '00000016' / 'state')
  want = read(alone)
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  like = jax.tree.map(shape, {'params': want['params'], 'opt_state': want['opt_state']})
  where = sharding.param_shardings(like, mesh)
  like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, where)
  like['step'] = jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(mesh))
  like |= {'ema': None, 'frozen': None}
  got, run = checkpoint.Checkpoints(str(both[0] / 'checkpoints')).restore(16, like)
  assert run['step'] == int(got['step']) == 16
  table = got['params']['embedding']
  assert len(table.sharding.device_set) == devices
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got['params'], want['params']
  )


@pytest.mark.slow
def test_kill_one_and_the_run_goes_on_as_if_it_was_never_cut(alone, tmp_path):
  workdir = tmp_path / 'run'
  first, second = start(train(workdir), 2)
  test_commands.wait_for(lambda: test_commands.lines(workdir) >= 7, first, 900)
  second.send_signal(signal.SIGKILL)
  ((_, told), _) = ended([first, second], [1, -signal.SIGKILL])
  assert 'stopped: another process of this run is gone' in told and 'Traceback' not in told
  cut = test_commands.lines(workdir)
  assert 7 <= cut < 17

  # The same command goes on; then SIGTERM comes to one of them, and both save the same step.
  processes = start(train(workdir), 2)
  test_commands.wait_for(lambda: newest(workdir) >= 8, processes[0], 900)
  processes[1].send_signal(signal.SIGTERM)
  (_, told), _ = ended(processes, [0, 0])
  (step,) = re.findall(r'Stopped by a signal; step (\d+) is saved', told) or [16]
  assert checkpoint.Checkpoints(str(workdir / 'checkpoints')).steps()[-1] == int(step)

  ended(start(train(workdir), 2), [0, 0])
  same_metrics(workdir, alone)


def newest(workdir):
  with contextlib.suppress(OSError, json.JSONDecodeError):
    return report.read_metrics(str(workdir / 'metrics.jsonl'))[-1]['step']
  return 0
