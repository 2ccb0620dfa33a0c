"""Numbers that are not finite, memory that is not there, and clocks that jump."""

import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
from safetensors import numpy as safetensors

from experiments.faults import lab as labs
from experiments.faults.lab import ROOT, Lab, Trial

STEP = 11  # between two saves
INJECT = 'experiments.faults.inject'
PAIR = ROOT / 'dopd_jax' / 'assets' / 'quickstart'


def nan(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """NaN in a file of weights, and while training."""
  cases = ('student', 'teacher', 'nan_in_weight', 'nan_in_teacher', 'nan_in_batch')
  for case in cases[done:]:
    yield _poisoned_step(lab, case) if case.startswith('nan') else _poisoned_file(lab, case)


def _poisoned_step(lab: Lab, fault: str) -> Trial:
  """Exit 1, nothing saved after it, and without the fault the run goes on."""
  # Of the methods, this is one whose loss reads what the sampler said.
  method = 'thinking_machines' if fault == 'nan_in_batch' else 'dopd'
  workdir = lab.fresh('nan')
  ended = lab.run(workdir, program=(INJECT, fault, str(STEP)), method=method)
  saves = labs.saved(workdir)
  told = ended.told('not finite', f'step {STEP}', code=1) and max(saves) < STEP
  after = lab.run(workdir, method=method)
  same = after.code == 0 and lab.same(workdir, method=method)
  seen = f'exit {ended.code}: {ended.sentence[:300]}; newest checkpoint {max(saves, default=0)}; '
  seen += 'without the fault equal' if same else 'afterwards NOT EQUAL'
  return Trial(f'{fault.replace("_", " ")} at step {STEP}', seen, told and same)


def _poisoned_file(lab: Lab, role: str) -> Trial:
  """A weight file that holds a NaN is refused before anything is written."""
  directory, workdir = lab.fresh(f'nan_{role}'), lab.fresh('nan')
  shutil.copytree(PAIR / role, directory)
  file = next(directory.glob('*.safetensors'))
  tensors = safetensors.load_file(file)
  name = sorted(tensors)[-1]
  tensors[name].reshape(-1)[0] = np.nan
  safetensors.save_file(tensors, file)
  ended = lab.run(workdir, **{f'{role}__path': directory})
  seen = f'exit {ended.code}: {ended.sentence.replace(str(lab.root), "")[:200]}'
  good = ended.told('NaN', name) and not workdir.exists()
  return Trial(f"NaN in the {role}'s weight file", seen, good)


def memory(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """One record has a prompt whose bucket fits no memory; the run stops when it comes to it."""
  del done
  tokens = 300_000
  lines = labs.records(64, 1000)
  long = lines[20]
  long['prompt'] = f'{long["prompt"]} ' + '; ' * tokens
  data, workdir = lab.root / 'long.jsonl', lab.fresh('memory')
  labs.write(data, lines)
  ended = lab.run(
    workdir,
    data__train=data,
    data__max_prompt_tokens=2 * tokens,
    **_long_pair(lab, 4 * tokens),
  )
  saves = labs.saved(workdir)
  whole = bool(saves) and not labs.saving(workdir)
  seen = f'exit {ended.code}: {ended.sentence[:260]}; checkpoints {saves}'
  yield Trial(f'a prompt of {tokens:,} tokens', seen, ended.told('memory') and whole)


def _long_pair(lab: Lab, context: int) -> dict[str, pathlib.Path]:
  """The pair of the quickstart with a longer context written into its configs."""
  found = {}
  for role in ('student', 'teacher'):
    directory = lab.fresh(f'long_{role}')
    shutil.copytree(PAIR / role, directory)
    config = directory / 'config.json'
    old = '"max_position_embeddings": 128'
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, f'"max_position_embeddings": {context}'))
    found[f'{role}__path'] = directory
  return found


def clocks(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """The wall clock jumps by a day: the same numbers, or one sentence, and sane times."""
  for fault in ('clock_back', 'clock_forward')[done:]:
    workdir = lab.fresh('clock')
    ended = lab.run(workdir, program=(INJECT, fault, str(STEP)))
    told = ended.code == 0 or ended.told('could not be saved')
    words = f'exit {ended.code}'
    if ended.code:  # Orbax tells by the wall clock that a save takes too long
      words += f': {ended.sentence[:200]}; then'
      ended = lab.run(workdir)
    same = told and ended.code == 0 and lab.same(workdir)
    times = labs.step_seconds(workdir)
    sane = all(0 <= t < 3600 for t in times)
    seen = f'{words}, {"equal" if same else "NOT EQUAL"}, '
    seen += f'seconds a step {min(times):.3g} to {max(times):.3g}'
    yield Trial(fault.replace('_', ' ') + ' by a day', seen, same and sane)
