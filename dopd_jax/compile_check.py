r"""Compiles a run for a machine that is not there, and says whether it fits and what it moves.

  python -m dopd_jax.compile_check --config=configs/llm.py --topology=v5e:16x16
  python -m dopd_jax.compile_check --config=configs/llm.py --topology=v5e:4x4 --search=6
  python -m dopd_jax.compile_check --config=configs/llm.py:smoke --topology=cpu:8

The programs are those that `train` runs, rollout, score and update, with the shapes of the config's
models and of its largest batch; no weights, tokenizer or data are read. (With a teacher that is
offloaded `train` runs score in parts; here it is one program, which needs no less.) On a CPU, in
minutes; TPU topologies need libtpu (`pip install -e '.[tpu]'`). Where the config's mesh does not
divide its rows, the largest that does is taken, and said.

`--search=6` goes on with what is proposed, six times at most, until everything fits. The table is
also written as JSON, which keeps the programs of an earlier check of the same: `--programs=update`
compiles one alone.
"""

import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from dopd_jax import cli, collect, sharding, teachers, train, workdirs
from dopd_jax import config as configs
from dopd_jax import state as states
from dopd_jax.config import Config
from dopd_jax.pods import flops, hlo, proposals, shapes, table, topologies
from dopd_jax.pods.topologies import Topology
from dopd_jax.policies import Pair

FLAGS = flags.FLAGS
PROGRAMS = ('rollout', 'score', 'update')
# Which of them another value changes; of a setting that is not here, all.
CHANGES = {
  'rollout.prompts_at_once': {'rollout'},
  'rollout.kv_cache': {'rollout'},
  'microbatch': {'score', 'update'},
  'remat': {'update'},
}


def check(
  config: Config,
  topology: Topology,
  tell: Callable[[str], Any],
  wanted: Collection[str] = PROGRAMS,
) -> dict[str, Any]:
  """Compiles the programs of a run for a topology.

  Args:
    config: of the run.
    topology: of the machine.
    tell: called with a sentence before each compilation.
    wanted: which of `PROGRAMS`.

  Returns:
    What the JSON holds: bytes, FLOPs and collectives are those of one device.

  Raises:
    UserError: the mesh does not fit, or the models are not known.
  """
  objective = config.objective.build()
  mesh = sharding.make_mesh(
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=topology.devices
  )
  workdirs.check_rows(config, objective, mesh)
  # Abstract: with the mesh itself, constants would be put on devices that are not there.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    pair = shapes.pair(config, mesh, objective.weights, topology.platform)
    tx = states.optimizer(config.optimizer, config.steps, objective.updates, config.freeze)
    state = shapes.state(pair, tx, objective, mesh)
    given = {k: {n: x.params for n, x in v.items()} for k, v in pair.given.items()}
    resident = {
      kind: {name: shapes.resident(getattr(config, kind), x) for name, x in by_name.items()}
      for kind, by_name in pair.given.items()
    }
    prompts = shapes.prompts(config, objective, pair, mesh)
    images = shapes.images(config, objective, pair, mesh)
    completions = shapes.rollout(config, objective, mesh)
    batch = shapes.batch(config, objective, mesh, prompts, images, completions)
    steps = train.compile_steps(config, pair, objective, tx, state)
    lengths = {name: prompt.tokens.shape[1] for name, prompt in prompts.items()}
    counted = flops.count(config, objective, pair, lengths)
    found, spans = {}, spans_vocabulary(pair, mesh)

    def compile_one(name, beside, fn, *args):
      if name not in wanted:
        return None
      tell(f'{name}: compiling for {len(topology.devices)} x {topology.chip.name}')
      compiled, found[name] = _compile(fn, args, (state, beside), spans)
      found[name]['flops'] = counted[name] / len(topology.devices)
      return compiled

    if objective.source != 'data':
      once = _rows_of(config.rollout.prompts_at_once or config.rollout.prompts)
      prompt = once(prompts[objective.student.prompt])
      shown = once((images or {}).get(objective.student.image))
      index = jax.ShapeDtypeStruct(prompt.length.shape, np.uint32, sharding=prompt.length.sharding)
      key = jax.eval_shape(lambda: jax.random.key(0))
      sample = collect.make_rollout(config, pair, objective)
      compile_one('rollout', resident, sample, state.params, prompt, key, index, shown)
    compiled = compile_one('score', given, steps.score, state, given, batch, resident)
    scored = jax.eval_shape(steps.score, state, given, batch, resident)
    rows = lambda x: sharding.rows(mesh) if x.ndim else sharding.replicated(mesh)
    where = compiled.output_shardings if compiled else jax.tree.map(rows, scored)
    scored = shapes.lying(scored, where)
    compile_one('update', resident, steps.update, state, resident, batch, scored)

  limit = topology.chip.memory
  for program in found.values():
    program['fits'] = 'error' not in program and (not limit or program['needs'] <= limit)
  return {
    'topology': topology.name,
    'devices': len(topology.devices),
    'chip': topology.chip.name,
    'memory': limit,
    'mesh': dict(mesh.shape),
    'student': config.student.path,
    'teacher': config.teacher.path,
    'objective': objective.name,
    'rows': completions.tokens.shape[0],
    'microbatch': config.microbatch,
    'kv_heads': pair.student.model.config.num_key_value_heads,
    'tokens': {**lengths, 'completion': config.rollout.max_new_tokens},
    'held': {
      'state': shapes.bytes_a_device(state),
      **{kind: shapes.bytes_a_device(params) for kind, params in resident.items()},
    },
    'parked': shapes.bytes_a_device(given) - shapes.bytes_a_device(resident),
    'could_wait': _trunks(pair.given.get('teacher', {}), config.teacher.offload),
    'programs': found,
    'fits': all(program['fits'] for program in found.values()),
    'versions': {name: _version(name) for name in ('jax', 'jaxlib', 'libtpu')},
  }


def _trunks(teachers_of_run: Mapping[str, Any], offload: bool) -> int:
  """Bytes a device that offloading the teacher would free; its head stays."""
  if offload:
    return 0
  return sum(
    shapes.bytes_a_device(x.params) - shapes.bytes_a_device(teachers.head(x.model, x.params))
    for x in teachers_of_run.values()
  )


def _rows_of(count: int) -> Callable[[Any], Any]:
  """The first `count` rows of shapes."""
  first = lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=x.sharding)
  return lambda tree: jax.tree.map(first, tree)


def _compile(fn: Any, args: Any, held: Any, spans: Any) -> tuple[Any, dict[str, Any]]:
  """The compiled program, None if it was refused, and what is known of it.

  Args:
    fn: jitted.
    args: shapes with shardings.
    held: those of them that stay on the devices whether the program reads them or not.
    spans: `spans_vocabulary`.
  """
  start = time.time()
  lowered = fn.lower(*args)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None, {'seconds': time.time() - start, **refusal(str(error))}
  seconds = time.time() - start
  leaves = lambda tree: jax.tree.leaves(tree, is_leaf=lambda x: x is None)
  read = {id(x) for x, at in zip(leaves(args), leaves(compiled.input_shardings[0])) if at}
  memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
  sizes = {
    'arguments': memory.argument_size_in_bytes,
    # Without those that take the memory of an argument.
    'results': memory.output_size_in_bytes - memory.alias_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'code': memory.generated_code_size_in_bytes,
    # Of the state and the given models, what this program does not read.
    'beside': shapes.bytes_a_device([x for x in jax.tree.leaves(held) if id(x) not in read]),
  }
  every = program.collectives()
  collectives = program.heaviest(every)
  return compiled, {
    'seconds': seconds,
    **sizes,
    'needs': sum(sizes.values()),
    'peak': memory.peak_memory_in_bytes + sizes['beside'],
    'xla_flops': (compiled.cost_analysis() or {}).get('flops'),  # bodies of loops once
    'collectives': [
      {
        'kind': c.kind,
        'arrays': list(map(str, c.arrays)),
        'times': c.times,
        'bytes': c.bytes,
        'source': c.source,
      }
      for c in collectives
    ],
    'wide': [f'{c.kind} {a} {c.source}' for c in every for a in c.arrays if spans(a)],
    'largest': [
      {'array': str(x.array), 'bytes': x.array.bytes, 'source': x.source}
      for x in program.largest(8)
    ],
  }


def refusal(message: str) -> dict[str, Any]:
  """What the compiler says as it runs out of memory: a sentence, bytes, and the largest buffers."""
  sentence = message.strip().removeprefix('RESOURCE_EXHAUSTED:').strip().splitlines()[0]
  found: dict[str, Any] = {'error': sentence}
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30}
  if sizes := re.findall(r'\b(\d+(?:\.\d+)?)([KMG])\b', sentence):
    found['needs_at_least'] = max(int(float(n) * units[unit]) for n, unit in sizes)
  if 'HLO temporaries' in sentence:
    found['temporaries'] = found['needs_at_least']
  buffers = re.split(r'\n\s*\d+\. Size: ', message)[1:]
  part = lambda pattern, text: (re.search(pattern, text) or ('', ''))[1]
  found['largest'] = [
    {
      'array': part(r'Shape: (\S+?\])', text),
      'size': text.split()[0],
      'source': part(r'op_name="([^"]*)"', text),
    }
    for text in buffers[:8]
  ]
  return found


def spans_vocabulary(pair: Pair, mesh: jax.sharding.Mesh) -> Callable[[hlo.Array], bool]:
  """Whether an array has a column for each id, or for each id of a shard, as logits have.

  Tables [V, D] and their gradients do not count, whole or as [tensor, V / tensor, D]: weights
  travel, by the shards of `tensor`. Nor do vocabularies below 1,024 ids, a size that other arrays
  have too.
  """
  columns, widths, tensor = set(), set(), mesh.shape['tensor']
  for c in (loaded.model.config for loaded in pair.policies.values()):
    for parts in {1, tensor}:
      exact = -(-c.vocab_size // parts)
      columns |= {exact, -(-exact // 128) * 128} if c.vocab_size >= 1024 else set()
    widths |= {c.hidden_size // n for n in range(1, mesh.shape['fsdp'] + 1)}

  def spans(array: hlo.Array) -> bool:
    sizes = [n for n in array.shape if n != 1]
    rest = [n for n in sizes if n not in columns]
    if len(rest) == len(sizes):
      return False
    if len(rest) == 2 and sizes[0] == tensor:
      rest = rest[1:]
    return not (len(rest) == 1 and rest[0] in widths)

  return spans


def search(
  config: Config,
  topology: Topology,
  console: Console,
  most: int,
  wanted: Collection[str] = PROGRAMS,
) -> dict[str, Any]:
  """Checks, and changes one setting after the other until the run fits; `most` changes at most.

  What fitted is not compiled anew by a change until everything else fits too.
  """
  asked, wanted = config, set(wanted)
  config = proposals.fitting_mesh(config, config.objective.build(), len(topology.devices))
  changes: dict[str, Any] = {}
  known: dict[str, Any] = {}
  todo, stale = wanted, set()
  if config != asked:
    changes = {'mesh.fsdp': config.mesh.fsdp, 'mesh.tensor': config.mesh.tensor}
  while True:
    report = check(config, topology, console.print, todo) | {'changes': changes}
    known |= report['programs']
    report['programs'] = {n: known[n] for n in PROGRAMS if n in known and n not in stale}
    report['fits'] = all(program['fits'] for program in known.values())
    table.show(report, console)
    proposal = proposals.smallest_change(config, report)
    if proposal is None and stale:
      todo, stale = stale, set()
      continue
    if proposal is None:
      settings = ' '.join(f'--config.{key}={value}' for key, value in changes.items())
      console.print(f'fits{" with " if settings else ""}{settings}', soft_wrap=True)
      return report
    report['proposal'] = proposal.why
    console.print(f'does not fit: {proposal.why}', soft_wrap=True, highlight=False)
    if not proposal.settings or not most:
      return report
    config, most = configs.changed(config, proposal.settings), most - 1
    touched = (CHANGES.get(key, PROGRAMS) for key in proposal.settings)
    stale |= wanted & set().union(*touched)
    todo = {name for name in stale if not known[name]['fits']} or stale
    stale = stale - todo
    changes = changes | dict(proposal.settings)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  """The new report, with those programs of the old that it lacks if nothing else differs."""
  found = ('programs', 'fits', 'proposal')
  if any(old.get(key) != new[key] for key in new if key not in found):
    return new
  programs = {**old['programs'], **new['programs']}
  ordered = {name: programs[name] for name in PROGRAMS if name in programs}
  return {**new, 'programs': ordered, 'fits': all(p['fits'] for p in ordered.values())}


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def main() -> None:
  """The command."""
  jax.config.update('jax_enable_compilation_cache', False)  # seconds are those of a compilation
  config = cli.config_of(_CONFIG)
  topology = topologies.find(FLAGS.topology)
  console = Console()
  report = search(config, topology, console, FLAGS.search, FLAGS.programs)
  models = [p.rpartition('/')[2].lower() for p in (config.teacher.path, config.student.path) if p]
  path = os.path.join(FLAGS.out, f'{"_".join(models)}_{topology.name.replace(":", "-")}.json')
  os.makedirs(FLAGS.out, exist_ok=True)
  if os.path.exists(path):
    with open(path) as file:
      report = merged(json.load(file), report)
  with open(path, 'w') as file:
    json.dump(report, file, indent=1)
  console.print(f'written: {path}', highlight=False, soft_wrap=True)


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', 'configs/llm.py', 'What would run.')
  flags.DEFINE_string('topology', 'v5e:16x16', 'v5e:4x4, v6e:8x8, v5:4x4x4 (v5p), cpu:8, ...')
  flags.DEFINE_integer('search', 0, 'Settings to change, at most, one after the other.')
  flags.DEFINE_multi_enum('programs', PROGRAMS, PROGRAMS, 'What to compile.')
  flags.DEFINE_string('out', 'runs/compile_check', 'Where the JSON goes.')
  cli.run(main, before=lambda: topologies.without_accelerators(FLAGS.topology))
