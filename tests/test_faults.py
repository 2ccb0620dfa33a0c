"""The parts of the fault experiments that judge: they must see a fault."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import cli
from experiments.faults import __main__ as command
from experiments.faults import files, inject, lab, long


def test_out_of_memory_is_one_sentence(capsys):
  with pytest.raises(SystemExit) as ended:
    cli._guarded(lambda: jax.block_until_ready(jnp.zeros(1 << 52, jnp.float32)))
  assert ended.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith('error: out of memory') and 'microbatch' in said
  assert said.count('\n') == 1
  with pytest.raises(jax.errors.JaxRuntimeError):  # what is no lack of memory stays what it is
    cli._guarded(lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError('INTERNAL: x')))


def test_every_harm_changes_a_file(tmp_path):
  for name, harm in files.HARMS.items():
    path = tmp_path / 'x'
    path.write_bytes(b'some content')
    harm(path)
    assert not path.exists() or path.read_bytes() != b'some content', name


def test_one_number_is_poisoned():
  array = inject.poison(jnp.ones((2, 3)))
  assert np.isnan(array).sum() == 1


@pytest.mark.parametrize(
  'code, log, good',
  [
    (2, 'x\nerror: data changed', True),
    (1, 'error: data changed', False),
    (2, 'error: other', False),
    (2, 'Traceback\nerror: data changed', False),
    (2, '', False),
  ],
)
def test_what_counts_as_a_sentence(code, log, good):
  assert lab.Ended(code, log).told('data') == good


def test_a_trial_that_was_not_expected_is_counted():
  result = {'injected': 'i', 'expected': 'e', 'n': 2, 'of': 3, 'as_expected': 1, 'commit': 'c'}
  result |= {'versions': {'jax': '0'}, 'device': 'cpu'}
  result |= {'trials': [lab.Trial('a', 'x', True)._asdict(), lab.Trial('b', 'y', False)._asdict()]}
  made = command.table([result], [])
  assert '| i | e | 2 (of 3 planned) | 1 |' in made and '| b | y | **no** |' in made


@pytest.mark.parametrize('growth, flat', [(0.0, True), (0.2, False)])
def test_growth_is_seen_through_noise(growth, flat):
  rng = np.random.default_rng(0)
  steps = np.arange(1, 2001)
  noise = rng.exponential(0.05, len(steps))  # a busy machine only ever adds time
  values = (1 + growth * steps / 2000) * (1 + noise)
  pairs = list(zip(steps.tolist(), values.tolist()))
  seen = {'memory_mib': pairs, 'step_seconds': pairs, 'compiled_programs': [(1, 5), (1999, 5)]}
  judged = long.judge(seen, 2000)
  assert judged['memory_mib']['flat'] == judged['step_seconds']['flat'] == flat
  assert judged['compiled_programs']['flat']
  assert judged['step_seconds']['growth_over_the_run'] == pytest.approx(growth * 0.9, abs=0.05)
