r"""Several processes, one run: how they find each other, and how they end.

The same command is started once on every machine of a cluster, or once a GPU. `start` then decides
by itself whether there are others:

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   set by hand, for everything else
  Slurm, Open MPI                                              a job step of several tasks
  TPU                                                          a slice, or slices, of several hosts

On one machine it does nothing: no network, no waiting. JAX_NUM_PROCESSES=1 makes it stay out of the
way anywhere. Seconds, in the environment: DOPD_JAX_START_SECONDS (300) to wait for all processes,
DOPD_JAX_HEARTBEAT_SECONDS (100) after which a silent process counts as dead and all others end.
"""

import contextlib
import hashlib
import os
import re
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from dopd_jax.errors import UserError

BY_HAND = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SECONDS = {'DOPD_JAX_START_SECONDS': 300, 'DOPD_JAX_HEARTBEAT_SECONDS': 100}
# What XLA says where another process is gone, by the words of Gloo, NCCL and jax's own service.
_LOST = ('Gloo ', 'NCCL ', 'coordination', 'heartbeat', 'Connection reset', 'Connection closed')


class Cluster(NamedTuple):
  """The processes of a run, two or more."""

  kind: str  # for people
  processes: int
  arguments: dict[str, Any]  # of jax.distributed.initialize


def start(several: bool = True) -> None:
  """Joins the other processes of the run, if there are any; comes before anything that computes.

  Args:
    several: whether this command can run on several processes.

  Raises:
    UserError: what the environment says of the other processes is incomplete, or they and this
      command don't fit.
  """
  if jax.distributed.is_initialized():  # by whoever calls us
    return
  platforms: Any = jax.config.jax_platforms  # type: ignore[missing-attribute] (made at run time)
  cluster = detect(os.environ, platforms or '')
  if cluster is None:
    return
  if not several:
    raise UserError(
      f'this command runs on one process, and {cluster.kind} has {cluster.processes} here: start '
      'it on one machine, or with JAX_NUM_PROCESSES=1'
    )
  wait, heartbeat = (_seconds(os.environ, name) for name in SECONDS)
  logging.info('Waiting for the %d processes of %s.', cluster.processes, cluster.kind)
  # jax ends the process, with a stack trace, where the others don't come.
  timer = threading.Timer(wait, _alone, (cluster, wait))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **cluster.arguments,
      initialization_timeout=wait + 60,
      heartbeat_timeout_seconds=heartbeat,
    )
  except (RuntimeError, ValueError, OSError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'the processes of {cluster.kind} could not be joined ({reason}): correct the address, or '
      'set JAX_NUM_PROCESSES=1 to run alone'
    ) from error
  finally:
    timer.cancel()
  if jax.process_index():
    logging.set_verbosity(logging.ERROR)  # one writer of logs


def detect(
  environ: Mapping[str, str], platforms: str = '', metadata: Callable[[str], str] | None = None
) -> Cluster | None:
  """The cluster that this process is a part of; None where it runs alone.

  Args:
    environ: the environment.
    platforms: jax's `jax_platforms`, which names the TPU on a TPU VM unless the user chose others.
    metadata: of the TPU VM by key, '' where there is none.

  Raises:
    UserError: a variable is missing or no number.
  """
  if environ.get('JAX_NUM_PROCESSES') == '1':
    return None
  given = [name for name in BY_HAND if environ.get(name)]
  if len(given) == len(BY_HAND):
    return _by_hand(environ)
  found = _slurm(environ) or _open_mpi(environ)
  if found is None and 'tpu' in platforms.split(','):
    found = _tpu(environ, metadata or _metadata)
  if given and not (found and given == [BY_HAND[0]]):  # jax reads the address by itself
    missing = next(name for name in BY_HAND if name not in given)
    raise UserError(
      f'{missing} is not set and {given[0]} is: give every process all of {", ".join(BY_HAND)}, or '
      'none of them'
    )
  return found


def _by_hand(environ: Mapping[str, str]) -> Cluster:
  address, *_ = (environ[name] for name in BY_HAND)
  count, index = (_number(environ, name) for name in BY_HAND[1:])
  if not re.fullmatch(r'.+:\d+', address):
    raise UserError(f'JAX_COORDINATOR_ADDRESS is HOST:PORT of process 0, not {address!r}')
  if not 0 <= index < count:
    raise UserError(
      f'JAX_PROCESS_ID is {index} and JAX_NUM_PROCESSES {count}: number the processes from 0'
    )
  arguments = {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': index,
    'cluster_detection_method': 'deactivate',
  }
  return Cluster(address, count, arguments)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
  """A step of several tasks. A batch script and an interactive shell have the variables of the
  whole job as well, with its number of tasks, and run alone: only srun describes a step."""
  needed = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
  if not all(name in environ for name in (*needed, 'SLURM_STEP_NUM_TASKS')):
    return None
  count = _number(environ, 'SLURM_STEP_NUM_TASKS')
  if count == 1:
    return None
  arguments = {
    'num_processes': count,
    'process_id': _number(environ, 'SLURM_PROCID'),
    'local_device_ids': _slurm_gpus(environ),
    'cluster_detection_method': 'slurm',
  }
  return Cluster(f'Slurm job {environ["SLURM_JOB_ID"]}', count, arguments)


def _slurm_gpus(environ: Mapping[str, str]) -> list[int] | None:
  """Which of the GPUs that a task sees are its own; jax would take one, whatever there is."""
  if not environ.get('CUDA_VISIBLE_DEVICES'):
    return None
  seen = len(environ['CUDA_VISIBLE_DEVICES'].split(','))
  runs = re.findall(r'(\d+)(?:\(x(\d+)\))?', environ.get('SLURM_STEP_TASKS_PER_NODE', '1'))
  tasks = [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]
  here = tasks[min(int(environ.get('SLURM_NODEID', 0)), len(tasks) - 1)]
  bound = seen < int(environ.get('SLURM_GPUS_ON_NODE', seen))  # Slurm hides those of other tasks
  if bound or seen < here:
    return list(range(seen))
  share, place = seen // here, _number(environ, 'SLURM_LOCALID')
  return list(range(place * share, (place + 1) * share))


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
  if 'OMPI_MCA_orte_hnp_uri' not in environ or environ.get('OMPI_COMM_WORLD_SIZE') in (None, '1'):
    return None
  count = _number(environ, 'OMPI_COMM_WORLD_SIZE')
  return Cluster('Open MPI', count, {'cluster_detection_method': 'ompi'})


def _tpu(environ: Mapping[str, str], metadata: Callable[[str], str]) -> Cluster | None:
  """All hosts of a slice, or of several slices: their TPUs start only together."""
  hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')
  slices, method = environ.get('MEGASCALE_NUM_SLICES'), 'gketpu'
  if hosts is None:
    if 'TPU_SKIP_MDS_QUERY' in environ:
      return None
    hosts, method = metadata('worker-network-endpoints'), 'gcetpu'
    found = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", metadata('tpu-env'))
    slices = slices or (found and found[1])
  count = len(hosts.split(',')) * int(slices or 1)
  return Cluster('this TPU', count, {'cluster_detection_method': method}) if count > 1 else None


def _metadata(key: str) -> str:
  """An attribute of a Google Cloud VM, from the server on its own machine."""
  host = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  url = f'http://{host}/computeMetadata/v1/instance/attributes/{key}'
  request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError as error:
    if not isinstance(error, urllib.error.HTTPError):  # which says that there is none
      logging.warning('No metadata of this TPU VM (%s): taken to run alone.', error)
    return ''


def _number(environ: Mapping[str, str], name: str) -> int:
  if not environ[name].isdigit():
    raise UserError(f'{name} must be a whole number, not {environ[name]!r}')
  return int(environ[name])


def _seconds(environ: Mapping[str, str], name: str) -> int:
  value = environ.get(name, str(SECONDS[name]))
  if not value.isdigit() or not int(value):
    raise UserError(f'{name} must be a whole number of seconds from 1, not {value!r}')
  return int(value)


def _alone(cluster: Cluster, seconds: int) -> None:
  print(
    f'error: the {cluster.processes} processes of {cluster.kind} did not meet within {seconds} '
    'seconds: start the command once for each of them, see that they reach process 0, or set '
    'JAX_NUM_PROCESSES=1 to run alone',
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)


# ------------------------------------------------------------------ agreement and ends
def check_same(what: str, value: str) -> None:
  """Raises `UserError`, on every process, unless all have the same `value`."""
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
  everyone = multihost_utils.process_allgather(digest)
  differ = np.flatnonzero((everyone != everyone[0]).any(1))
  if len(differ):
    raise UserError(
      f'process {differ[0]} has other {what} than process 0: start all of them with the same '
      'command, code and files'
    )


def first(number: int) -> int:
  """The number of process 0, on every process."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def lost(error: BaseException) -> bool:
  """Whether an error of XLA, or of a save that waits for the others, says that one is gone."""
  return jax.distributed.is_initialized() and any(word in str(error) for word in _LOST)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """A process that fails leaves at once: an orderly end would wait for the others, who wait for it.

  They notice where they next communicate, or by the heartbeat.
  """
  try:
    yield
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    code = error.code if isinstance(error, SystemExit) else 1
    if code in (0, None):
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(RuntimeError):  # no device could be started
      if jax.process_index() == 0:  # jax aborts the others with it, who may have the same to say
        time.sleep(2)
    os._exit(code if isinstance(code, int) else 1)
