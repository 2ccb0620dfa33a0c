"""Runs compiled from shapes alone: what fits, what moves, and that no collective carries logits."""

import importlib.util
import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dopd_jax import collect, compile_check, models, sharding, train
from dopd_jax import config as configs
from dopd_jax.errors import UserError
from dopd_jax.pods import flops, proposals, shapes, topologies
from dopd_jax.pods.hlo import Array, Program
from dopd_jax.step import Steps
from tests import pairs

V = 4096


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  """A teacher and a student as their `config.json` alone."""
  found = []
  for name, width, layers in (('teacher', 96, 3), ('student', 64, 2)):
    sizes = models.DecoderConfig(
      vocab_size=V, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
      num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
      tie_word_embeddings=True, eos_token_ids=(1,), pad_token_id=0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp(name)
    (directory / 'config.json').write_text(json.dumps(sizes.to_hf()))
    found.append(str(directory))
  return found


def config(directories, **changes):
  teacher, student = directories
  base = {'teacher__path': teacher, 'student__path': student, 'rollout__samples': 2}
  base |= {'mesh__fsdp': 4, 'mesh__tensor': 2, 'rollout__gather_weights': True}
  return configs.validate(pairs.config(**(base | changes)))


def quiet(_):
  pass


@pytest.fixture(scope='module')
def report(directories):
  return compile_check.check(config(directories), topologies.find('cpu:8'), quiet)


def test_bytes_are_those_of_the_rules(report, directories):
  """A parameter lies on a device as often as its rule says; the programs hold what they read."""
  for name, directory in zip(('teacher', 'state'), directories):
    sizes = models.weights.read_config(models.resolve(directory))
    shapes = jax.eval_shape(models.build(sizes).init, jax.random.key(0))
    mesh = sharding.make_mesh(1, 4, 2)
    where = sharding.param_shardings(shapes, mesh)
    bytes_ = sum(
      4 * np.prod(at.shard_shape(x.shape))
      for x, at in zip(jax.tree.leaves(shapes), jax.tree.leaves(where))
    )
    # The state: parameters, two moments, and a few counts of steps.
    times, more = (3, 64) if name == 'state' else (1, 0)
    assert times * bytes_ <= report['held'][name] <= times * bytes_ + more
    if name == 'teacher':
      assert report['programs']['score']['arguments'] > report['held'][name]
  # Offloaded, the teacher leaves its tied table [V, 96], of which a device has an eighth.
  assert report['held']['teacher'] - report['could_wait'] == 4 * V * 96 // 8
  rollout = report['programs']['rollout']
  held = sum(report['held'].values())
  assert rollout['beside'] == pytest.approx(held - report['held']['state'] / 3, rel=1e-3)
  assert report['fits'] and all(p['needs'] >= p['temporaries'] for p in report['programs'].values())


def test_no_collective_carries_logits(report):
  assert [p['wide'] for p in report['programs'].values()] == [[], [], []]
  seen = {c['kind'] for p in report['programs'].values() for c in p['collectives']}
  assert {'all-gather', 'all-reduce'} <= seen


def test_logits_that_travel_are_found(directories, monkeypatch):
  """With blocks of ids that lie across shards, the sampler gathers its logits."""
  monkeypatch.setattr(sharding, 'shards', lambda *axes: 1)
  monkeypatch.setattr(sharding, 'constrain_columns', lambda x: sharding.constrain_rows(x))
  found = compile_check.check(config(directories, seed=1), topologies.find('cpu:8'), quiet)
  assert found['programs']['rollout']['wide']


@pytest.mark.parametrize(
  'shape, wide',
  [
    ((V, 16), False),  # a table whose width lies on four devices
    ((1, V // 2, 64), False),
    ((2, V // 2, 16), False),  # gathered over `tensor`
    ((8, V), True),  # logits of eight rows
    ((2, 5, V // 2), True),
    ((2, V // 2, 5), True),
    ((V // 2, 2, 5), True),
    ((8, 7, 64), False),
    ((2, 7, 64), False),
  ],
)
def test_logits_are_told_from_tables(directories, shape, wide):
  one = config(directories)
  mesh = sharding.make_mesh(1, 4, 2)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    pair = shapes.pair(one, mesh, {'teacher'}, 'cpu')
  assert compile_check.spans_vocabulary(pair, mesh)(Array('f32', shape)) == wide


def test_weights_are_gathered_once_a_rollout(report, directories):
  """Not once a token: what sampling moves is then a matter of completions, not of weights."""
  anew = config(directories, rollout__gather_weights=False)
  other = compile_check.check(anew, topologies.find('cpu:8'), quiet)

  def gathered(found):
    of_rollout = found['programs']['rollout']['collectives']
    return sum(c['bytes'] for c in of_rollout if c['kind'] == 'all-gather')

  assert gathered(other) > 2 * gathered(report)


@pytest.mark.slow
def test_the_programs_are_those_of_a_run(monkeypatch, tmp_path):
  """What `train` gives to its steps is what is compiled here: shapes, dtypes, shares."""
  ran, checked = {}, {}

  def facts(x):
    return x.shape, str(x.dtype), x.sharding.shard_shape(x.shape) if x.ndim else ()

  def watch(name, fn):
    def run(*args):
      ran[name] = [facts(x) for x in jax.tree.leaves(args)]
      return fn(*args)

    return run

  def watched(make):
    def made(*args):
      found = make(*args)
      if not isinstance(found, Steps):
        return watch('rollout', found)
      names = ('score', 'update')
      return found._replace(**{name: watch(name, getattr(found, name)) for name in names})

    return made

  def not_compiled(fn, args, *_):
    name = ('rollout', 'score', 'update')[len(checked)]
    checked[name] = [facts(x) for x in jax.tree.leaves(args)]
    return None, {'seconds': 0, 'error': ''}

  one = configs.validate(pairs.config(steps=1, data__eval='', checkpoint__best=''))
  with monkeypatch.context() as patch:
    patch.setattr(train, 'compile_steps', watched(train.compile_steps))
    patch.setattr(collect, 'make_rollout', watched(collect.make_rollout))
    train.train(one, str(tmp_path / 'run'))
  monkeypatch.setattr(compile_check, '_compile', not_compiled)
  compile_check.check(one, topologies.find('cpu:8'), quiet)
  assert set(ran) == set(checked)
  for name in ran:
    assert ran[name] == checked[name], name


def test_flops_of_a_block_are_the_compilers():
  """One layer, so that a loop's body counts once for both."""
  sizes = models.DecoderConfig(
    vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=1,
    num_attention_heads=8, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
  )  # fmt: skip
  model = models.build(sizes)
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
  valid = jax.ShapeDtypeStruct((4, 128), jnp.bool_)

  def logits(params, tokens, valid):
    return model.forward(params, tokens, valid)[0] @ model.head(params).T

  cost = jax.jit(logits).lower(params, tokens, valid).compile().cost_analysis()
  counted = flops.forward(model, 4, 128, 128) + flops.head(model, 4 * 128)
  assert counted == pytest.approx(cost['flops'], rel=0.05)


@pytest.mark.parametrize(
  'name, sentence',
  [
    ('v9:2x2', "there is no topology 'v9:2x2': use v5e:2x2"),
    ('v5e', "there is no topology 'v5e': use v5e:2x2"),
    ('cpu:2x2', 'cpu takes a number of devices, such as cpu:8, not cpu:2x2'),
  ],
)
def test_unknown_topologies(name, sentence):
  with pytest.raises(UserError, match=sentence):
    topologies.find(name)


def test_axes_that_do_not_divide(directories):
  with pytest.raises(UserError, match=r'mesh of data=1, fsdp=3, tensor=2 does not fit 8 devices'):
    compile_check.check(config(directories, mesh__fsdp=3), topologies.find('cpu:8'), quiet)
  with pytest.raises(UserError, match=r'rollout.prompts \(6\) must be a multiple of the 4 shards'):
    wrong = config(directories, rollout__prompts=6, microbatch=12)
    compile_check.check(wrong, topologies.find('cpu:8'), quiet)


def test_a_hub_name_without_a_preset(directories):
  with pytest.raises(UserError, match='the sizes of a/b are not known: give a directory'):
    compile_check.check(config(directories, teacher__path='a/b'), topologies.find('cpu:8'), quiet)


def test_an_open_mesh_takes_what_divides_its_rows():
  """8 rows a micro-batch and 8 prompts: of 32 devices 8 have rows of their own, 4 share each."""
  one = configs.validate(pairs.config(mesh__fsdp=-1))
  found = proposals.fitting_mesh(one, one.objective.build(), 32)
  assert found.mesh == configs.Mesh(1, 8, 4)
  assert proposals.fitting_mesh(one, one.objective.build(), 8) == configs.changed(
    one, {'mesh.fsdp': 8}
  )


def lacking(name, **of_program):
  """A report where one program needs 20 GiB of 16."""
  gib = topologies.GIB
  program = {'fits': False, 'needs': 20 * gib, 'temporaries': 15 * gib} | of_program
  mesh = {'data': 1, 'fsdp': 4, 'tensor': 1}
  held = {'state': 3 * gib, 'teacher': gib}
  found = {'programs': {name: program}, 'memory': 16 * gib, 'mesh': mesh, 'kv_heads': 2}
  return found | {'held': held, 'could_wait': gib}


@pytest.mark.parametrize(
  'name, changes, settings',
  [
    ('update', {'microbatch': 16}, {'microbatch': 8}),
    ('update', {'microbatch': 4, 'remat': False}, {'remat': True}),
    ('score', {'microbatch': 4}, {'mesh.fsdp': 2, 'mesh.tensor': 2, 'microbatch': 2}),
    ('rollout', {}, {'rollout.prompts_at_once': 4}),
    ('rollout', {'rollout.prompts_at_once': 4}, {'rollout.kv_cache': 'int8'}),
  ],
)
def test_the_smallest_change(name, changes, settings):
  base = {'rollout.prompts': 8, 'mesh.fsdp': 4}
  one = configs.changed(configs.validate(pairs.config()), base | changes)
  proposal = proposals.smallest_change(one, lacking(name))
  assert proposal.settings == settings
  assert 'needs 20.0 GiB of 16.00' in proposal.why
  configs.changed(one, settings)  # is a config


def test_as_many_halvings_as_are_needed():
  one = configs.changed(configs.validate(pairs.config()), {'mesh.fsdp': 4, 'microbatch': 16})
  gib = topologies.GIB
  sizes = {'needs': 40 * gib, 'temporaries': 35 * gib}
  assert proposals.smallest_change(one, lacking('update', **sizes)).settings == {'microbatch': 4}
  # One that was refused is known by what it needs at least: 4 GiB of it are held.
  refused = lacking('update')
  refused['programs']['update'] = {'fits': False, 'needs_at_least': 20 * gib}
  proposal = proposals.smallest_change(one, refused)
  assert proposal.settings == {'microbatch': 8} and 'then about 15.2' in proposal.why
  # Or by its temporaries alone: 4 + 20 GiB, then 4 + 20 (.4 + .6 / 4).
  error = (
    'RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.00G) exceeds 16.00G'
  )
  refused['programs']['update'] = {'fits': False, **compile_check.refusal(error)}
  proposal = proposals.smallest_change(one, refused)
  assert proposal.settings == {'microbatch': 4} and 'then about 15.0' in proposal.why


def test_a_search_compiles_anew_what_a_change_touches(monkeypatch):
  asked = []

  def check(config, topology, tell, wanted):
    asked.append(set(wanted))
    report = lacking('update')
    fits = {'rollout': config.rollout.prompts_at_once > 0, 'score': True, 'update': config.remat}
    program = report['programs'].pop('update')
    report['programs'] = {name: program | {'fits': fits[name]} for name in wanted}
    return report

  monkeypatch.setattr(compile_check, 'check', check)
  monkeypatch.setattr(compile_check.table, 'show', lambda report, console: None)
  changes = {'microbatch': 4, 'mesh.fsdp': 4, 'remat': False, 'rollout.prompts': 8}
  one = configs.changed(configs.validate(pairs.config()), changes)
  found = compile_check.search(one, topologies.find('cpu:4'), Console(quiet=True), most=4)
  assert asked == [{'rollout', 'score', 'update'}, {'rollout'}, {'update'}]
  assert found['fits'] and list(found['programs']) == ['rollout', 'score', 'update']
  assert found['changes'] == {'rollout.prompts_at_once': 4, 'remat': True}


def test_what_fits_is_compiled_last_in_a_search(monkeypatch):
  """A micro-batch is changed for update alone; score is looked at once update fits, and again."""
  asked = []

  def check(config, topology, tell, wanted):
    asked.append((config.microbatch, set(wanted)))
    GIB = topologies.GIB
    report = lacking('update', needs=int(17 * GIB), temporaries=int(10 * GIB))
    fits = {'rollout': True, 'score': config.microbatch != 8, 'update': config.microbatch < 16}
    program = report['programs'].pop('update')
    report['programs'] = {name: program | {'fits': fits[name]} for name in wanted}
    return report

  monkeypatch.setattr(compile_check, 'check', check)
  monkeypatch.setattr(compile_check.table, 'show', lambda report, console: None)
  changes = {'microbatch': 32, 'mesh.fsdp': 1, 'rollout.prompts': 16, 'rollout.samples': 2}
  one = configs.changed(configs.validate(pairs.config()), changes)
  search = lambda most: compile_check.search(
    one, topologies.find('cpu:1'), Console(quiet=True), most=most
  )
  found = search(4)
  assert found['fits'] and found['changes'] == {'microbatch': 4}
  assert list(found['programs']) == ['rollout', 'score', 'update']
  assert asked[0] == (32, {'rollout', 'score', 'update'}) and asked[-1][0] == 4
  assert {'score', 'update'} <= set().union(*(names for size, names in asked if size == 4))
  assert all('score' not in names for size, names in asked if size == 16)
  given_up = search(0)
  assert not given_up['fits'] and given_up['changes'] == {}


def test_a_teacher_waits_outside_where_that_is_enough():
  one = configs.changed(configs.validate(pairs.config()), {'microbatch': 4, 'mesh.fsdp': 4})
  gib = topologies.GIB
  little = lacking('update', needs=int(16.5 * gib))
  proposal = proposals.smallest_change(one, little)
  assert proposal.settings == {'teacher.offload': True}
  assert 'needs 16.5 GiB of 16.00, then about 15.5' in proposal.why
  offloaded = configs.changed(one, proposal.settings)
  done = little | {'could_wait': 0}
  assert 'mesh.tensor' in proposals.smallest_change(offloaded, done).settings
  alone = lacking('rollout', needs=int(16.5 * gib), temporaries=0)
  assert proposals.smallest_change(one, alone).settings == {'teacher.offload': True}


def test_weights_that_fill_the_device_ask_for_more_devices():
  one = configs.validate(pairs.config())
  proposal = proposals.smallest_change(one, lacking('update', temporaries=0))
  assert not proposal.settings and 'more devices' in proposal.why
  assert proposals.smallest_change(one, {'programs': {'score': {'fits': True}}}) is None


REFUSED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.08G of 15.75G hbm.

  Largest program allocations in hbm:

  1. Size: 4.50G
     Operator: op_name="jit(update)/dot_general"
     Shape: bf16[4,6144]{1,0}
     Unpadded size: 4.50G

  2. Size: 1.00G
     Shape: f32[8]{0}
"""


def test_a_refusal_is_read():
  found = compile_check.refusal(REFUSED)
  assert 'Used 16.08G of 15.75G hbm' in found['error']
  assert found['needs_at_least'] == int(16.08 * topologies.GIB)
  assert found['largest'] == [
    {'array': 'bf16[4,6144]', 'size': '4.50G', 'source': 'jit(update)/dot_general'},
    {'array': 'f32[8]', 'size': '1.00G', 'source': ''},
  ]


def test_collectives_of_loops_count_by_their_passes():
  """5 passes around 3: the inner product is reduced 15 times, 4 bytes each."""
  mesh = sharding.make_mesh(8, 1, 1)
  rows = sharding.rows(mesh)

  def fn(x):
    def outer(total, _):
      inner = lambda c, _: (jnp.sum(x * c) + 1.0, None)
      return jax.lax.scan(inner, total, None, length=3)[0], None

    return jax.lax.scan(outer, jnp.float32(1.0), None, length=5)[0]

  x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=rows)
  program = Program(jax.jit(fn).lower(x).compile().as_text())
  (found,) = [c for c in program.collectives() if c.kind == 'all-reduce']
  assert (found.arrays, found.times, found.bytes) == ((Array('f32', ()),), 15, 60)


def test_a_loop_whose_bound_is_carried_and_one_operation_in_many_fusions():
  """As a TPU's text has them: no trip counts, and one channel started and finished apart.

  What it runs beside may be a loop, whose fusions then hold it as well.
  """
  program = Program(
    """HloModule m
%cond (p: (s32[], s32[], bf16[8,4])) -> pred[] {
  %p = (s32[]{:T(128)}, s32[], bf16[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%start (q: bf16[1,4]) -> bf16[8,4] {
  %q = bf16[1,4]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,4]{1,0} all-gather(%q), channel_id=7, dimensions={0}
}
%done (q.1: bf16[1,4]) -> bf16[8,4] {
  %q.1 = bf16[1,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,4]{1,0} all-gather(%q.1), channel_id=7, dimensions={0}
}
%step (q.2: bf16[1,4]) -> bf16[8,4] {
  %q.2 = bf16[1,4]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[8,4]{1,0} all-gather(%q.2), channel_id=7, dimensions={0}
}
%inner (c: bf16[1,4]) -> bf16[1,4] {
  %c = bf16[1,4]{1,0} parameter(0)
  %s = bf16[8,4]{1,0} fusion(%c), kind=kCustom, calls=%step
  ROOT %d = bf16[1,4]{1,0} slice(%s)
}
%body (b: (s32[], s32[], bf16[8,4])) -> (s32[], s32[], bf16[8,4]) {
  %b = (s32[], s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[1,4]{1,0} slice(%b)
  %f = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%start
  %v = bf16[1,4]{1,0} while(%x), condition=%cond, body=%inner, known_trip_count{"n":"24"}
  %g = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%done
  ROOT %t = (s32[], s32[], bf16[8,4]{1,0}) tuple(%b, %f, %g)
}
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %bound = s32[] constant(28)
  %copy = s32[] copy(%bound)
  %init = (s32[], s32[], bf16[8,4]{1,0}) tuple(%zero, %copy, %a)
  %w = (s32[], s32[], bf16[8,4]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %r = bf16[8,4]{1,0} get-tuple-element(%w), index=2
}
"""
  )
  (found,) = program.collectives()
  assert (found.kind, found.times, found.bytes) == ('all-gather', 28, 28 * 8 * 4 * 2)


def test_of_a_conditional_the_branch_that_moves_most_counts():
  program = Program(
    """
%few (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}
%many (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %g = bf16[8,4]{1,0} all-gather(%x), channel_id=2, dimensions={0}
  ROOT %h = bf16[8,4]{1,0} all-gather(%g), channel_id=3, dimensions={0}
}
ENTRY %main (a: bf16[8,4], i: s32[]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %r = bf16[8,4]{1,0} all-reduce(%a), channel_id=4, to_apply=%add
  ROOT %c = bf16[8,4]{1,0} conditional(%i, %r, %r), branch_computations={%few, %many}
}
"""
  )
  every = program.collectives()
  assert len(every) == 4
  kinds = [c.kind for c in program.heaviest(every)]
  assert kinds == ['all-gather', 'all-gather', 'all-reduce']


def run(*args, **env):
  env = os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'false'} | env
  command = [sys.executable, '-m', 'dopd_jax.compile_check', *args]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_command_on_fake_devices(tmp_path):
  done = run('--config=configs/llm.py:smoke', '--topology=cpu:8', f'--out={tmp_path}')
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'fits with --config.mesh.fsdp=4 --config.mesh.tensor=2' in done.stdout
  (path,) = tmp_path.glob('*.json')
  found = json.loads(path.read_text())
  assert found['devices'] == 8 and set(found['programs']) == {'rollout', 'score', 'update'}


def test_a_mistake_is_a_sentence(tmp_path):
  done = run('--config=configs/llm.py', '--topology=v9:4x4', f'--out={tmp_path}')
  assert done.returncode == 2
  assert done.stderr.strip().startswith("error: there is no topology 'v9:4x4': use v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_tpu_that_is_not_there(directories, monkeypatch):
  """Compiled for four chips: it fits, and no logits travel."""
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  one = config(directories, mesh__fsdp=2)
  out = Console(file=io.StringIO(), width=120)
  found = compile_check.search(one, topologies.find('v5e:2x2'), out, most=0)
  assert found['fits'] and found['chip'] == 'TPU v5e' and found['devices'] == 4
  assert not any(p['wide'] for p in found['programs'].values())
  assert out.file.getvalue().strip().endswith('fits')
