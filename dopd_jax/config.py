r"""What a run can be told: frozen dataclasses, mirrored by an ml_collections ConfigDict.

The dataclasses are the schema. `default` turns them into a locked ConfigDict for `configs/*.py` and
the command line to change; `validate` turns that back into a frozen `Config`. An unknown key, a
value of the wrong type or out of its range is a `UserError` that says what to write instead.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from dopd_jax import glossary, objectives
from dopd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VisionArchitecture:
  """A vision tower beside the decoder where `layers` is not 0; Qwen3-VL-shaped."""

  layers: int = 0
  width: int = 0
  heads: int = 0
  feed_forward: int = 0
  deepstack: tuple = ()  # layers whose features also enter the first layers of the decoder
  patch: int = 16  # pixels
  merge: int = 2  # patches a side that become one token
  positions: int = 48  # learned positions a side


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A decoder made at random when `path` is empty; Qwen3-shaped."""

  layers: int = 0
  width: int = 0
  heads: int = 0
  kv_heads: int = 0
  head_width: int = 0
  feed_forward: int = 0
  max_position: int = 4096
  vision: VisionArchitecture = VisionArchitecture()


@dataclasses.dataclass(frozen=True)
class Policy:
  """Where a model comes from: a Hugging Face directory or hub name, or a GGUF file."""

  path: str = ''  # also `package:NAME/FILE.gguf`, a file that an installed package carries
  keep_every: int = 1  # n > 1 keeps layers 0, n, 2n, ... : a small student cut from a teacher
  architecture: Architecture = Architecture()  # for path=''; made from `seed`
  # Of a teacher or reference, which never changes:
  split_over: tuple = ('fsdp', 'tensor')  # the mesh axes that split its parameters; else copies
  offload: bool = False  # its trunk waits in the hosts' memory while it does not score


@dataclasses.dataclass(frozen=True)
class Data:
  """Records and how they are rendered; sources are a path, `tfds:NAME` or `task:NAME?option=..`."""

  train: str = ''
  stages: tuple = ()  # ((source, steps), ...), a curriculum instead of `train`
  eval: str = ''  # held-out records with a verifier; '' for none
  evals: tuple = ()  # (('math', source), ...): more of them, told as eval/accuracy/math
  columns: tuple = ()  # (('prompt', 'question'), ...): our column, theirs
  privileged: str = 'column'  # or 'none': both policies see an empty context
  privileged_kind: str = 'column'  # or made of boxes, labels, caption, answer: `data.KINDS`
  image_folder: str = ''  # where images may lie besides the data file's own; '/' is anywhere
  box_format: str = 'absolute'  # pixels of the image, or 'thousand' of its sides
  min_pixels: int = 0  # of an image after resizing; 0 is what the image processor says
  max_pixels: int = 0
  patch_bucket: int = 256  # images are padded to a multiple: sizes within one share a compilation
  privileged_template: str = ''  # '' is the default wording
  thinking: bool = False
  max_prompt_tokens: int = 1024  # of the plain and of the privileged prompt
  prompt_bucket: int = 64  # prompts are padded to a multiple: lengths within share a compilation
  on_too_long: str = 'drop'  # drop and count, or 'error'


@dataclasses.dataclass(frozen=True)
class Rollout:
  """How completions are made."""

  prompts: int = 128  # a step
  samples: int = 4  # completions a prompt
  max_new_tokens: int = 1024
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  prompts_at_once: int = 0  # memory: sample this many prompts at a time; 0 is all
  slots: int = 0  # memory: decode this many completions at once, others wait; 0 is all
  kv_cache: str = 'compute'  # memory: keys and values in the compute dtype, or 'int8'
  gather_weights: bool = False  # speed: sampling gathers the weights over `fsdp` once, not a token
  lag: int = 0  # 1: the next batch is sampled, by weights one update old, while this one trains


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with warm-up and cosine decay."""

  learning_rate: float = 5e-6
  warmup_steps: int = 0
  final_share: float = 0.0  # of the learning rate, at the last step
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # 0 is off


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Sizes of the device mesh's axes; -1 takes what is left."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Accuracy on held-out prompts, without the hint."""

  every: int = 0  # steps; 0 is never but at the start and the end
  records: int = 0  # of each held-out set; 0 is all
  temperature: float = 0.0
  teacher: bool = True  # measure the teacher once, at the start
  stop_at: float = 0.0  # a run ends at the first look, after its start, of this accuracy; 0: never


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """When the state is saved and what is kept."""

  every: int = 50
  keep: int = 2
  best: str = 'eval/accuracy'  # the metric by which the best one is kept as well; '' for none
  lower_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Log:
  """What a person sees."""

  every: int = 1
  tensorboard: bool = True
  samples: int = 16  # completions on samples.html


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  objective: Any = dataclasses.field(default_factory=objectives.Dopd)
  student: Policy = Policy()
  teacher: Policy = Policy()
  teachers: tuple = ()  # (('math', path), ...) instead: a record's column `teacher` names one
  reference: Policy = Policy()  # a second model, for objectives that extrapolate from one
  freeze: str = 'nothing'  # of a student that sees: 'vision' (all of it), 'tower', 'merger'
  tokenizer: str = ''  # '' is the student's; `task:plan_execute` builds the task's
  data: Data = Data()
  rollout: Rollout = Rollout()
  optimizer: Optimizer = Optimizer()
  evaluation: Evaluation = Evaluation()
  checkpoint: Checkpoint = Checkpoint()
  log: Log = Log()
  mesh: Mesh = Mesh()
  steps: int = 200
  microbatch: int = 8  # rows a forward and backward pass
  head_tile: int = 0  # tokens whose logits exist at once; 0: by the vocabulary, up to 256 MiB each
  remat: bool = True  # memory: blocks keep their input and are computed again in the backward pass
  compute_dtype: str = 'auto'  # bfloat16 on accelerators, float32 on CPU
  seed: int = 0


# In an existing workdir these may change: they decide when, not what.
CADENCE = ('log.', 'evaluation.every', 'checkpoint.every', 'checkpoint.keep')
# These too, since they decide memory and speed: results change by rounding alone.
MEMORY = (
  'microbatch',
  'head_tile',
  'remat',
  'rollout.slots',
  'rollout.prompts_at_once',
  'rollout.gather_weights',
  'teacher.offload',
  'teacher.split_over',
  'reference.offload',
  'reference.split_over',
)


def default(method: str = 'dopd', **changes: Any) -> ml_collections.ConfigDict:
  """A locked ConfigDict of every setting for `objective.name = method`, with top-level changes."""
  if method not in objectives.METHODS:
    raise UserError(unknown('method', method, objectives.METHODS))
  config = Config(objective=objectives.METHODS[method]())
  result = ml_collections.ConfigDict(_to_dict(config))
  result.lock()
  result.update(changes)
  return result


def validate(cfg: ml_collections.ConfigDict) -> Config:
  """The frozen `Config`; raises `UserError` for an unknown key, a wrong type or a wrong value."""
  values = cfg.to_dict() if hasattr(cfg, 'to_dict') else dict(cfg)
  chosen = values.get('objective', {})
  if not isinstance(chosen, dict):
    raise UserError(f'objective must be a group of settings, not {chosen!r}')
  method = chosen.get('name', 'dopd')
  if not isinstance(method, str) or method not in objectives.METHODS:
    raise UserError(unknown('objective.name', str(method), objectives.METHODS))
  config = _from_dict(Config(objective=objectives.METHODS[method]()), values, '')
  _check(config)
  return config


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
  """The config with other values of settings, by their dotted names; checked as `validate` does."""
  values = ml_collections.ConfigDict(_to_dict(config))
  values.update_from_flattened_dict(dict(settings))
  return validate(values)


def rows_of_batches(c: Config, objective: objectives.Objective) -> list[int]:
  """The numbers of rows that the run's batches can have."""
  sampled, fixed = c.rollout.prompts * c.rollout.samples, c.rollout.prompts
  by_source = {'student': [sampled], 'data': [fixed], 'mixed': [sampled, fixed]}
  return by_source[objective.source]


def micro_batches(rows: int, microbatch: int) -> int:
  """How many equal passes `rows` take, each of at most `microbatch`."""
  return -(-rows // microbatch)


def to_json(config: Config) -> str:
  """The config as JSON, as it stands in a workdir."""
  return json.dumps(_to_dict(config), indent=2, sort_keys=True)


def differences(old: dict, new: dict, ignore: tuple[str, ...] = CADENCE) -> list[str]:
  """What differs between two configs as dicts, but for the settings that `ignore` begins.

  A setting that is newer than `old` had its default there: a new setting's default is therefore
  what was done before it existed.
  """
  method = old.get('objective', {}).get('name')
  defaults = {}
  if method in objectives.METHODS:
    defaults = json.loads(to_json(Config(objective=objectives.METHODS[method]())))
  return _differences(_filled(old, defaults), new, ignore)


def _filled(old: dict, defaults: dict) -> dict:
  nested = lambda key, value: isinstance(value, dict) and isinstance(defaults.get(key), dict)
  known = {k: _filled(v, defaults[k]) if nested(k, v) else v for k, v in old.items()}
  return {**defaults, **known}


def _differences(old: dict, new: dict, ignore: tuple[str, ...], prefix: str = '') -> list[str]:
  found = []
  for key in sorted(old.keys() | new.keys()):
    name = f'{prefix}{key}'
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      found += _differences(a, b, ignore, f'{name}.')
    elif a != b and not name.startswith(ignore):
      found.append(f'{name} (was {a!r}, is {b!r})')
  return found


def parse_arg(arg: str, **defaults: Any) -> ml_collections.ConfigDict:
  """The part of `--config=file.py:a=1,b,c=x` behind the colon; a bare word is `True`.

  Raises:
    UserError: a word that is none of `defaults`, or a value of another type.
  """
  result = dict(defaults)
  for item in filter(None, arg.split(',')):
    key, _, value = item.partition('=')
    if key not in defaults:
      raise UserError(unknown('config argument', key, defaults))
    kind = type(defaults[key])
    if kind is bool:
      result[key] = value.lower() not in ('0', 'false')
    else:
      try:
        result[key] = kind(value)
      except ValueError:
        raise UserError(f'config argument {key} must be a {kind.__name__}, not {value!r}') from None
  return ml_collections.ConfigDict(result)


def unknown(what: str, word: str, known) -> str:
  """One sentence for a word that is not known, with the nearest one that is."""
  near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  hint = f'did you mean {near[0]!r}?' if near else f'it must be one of {", ".join(sorted(known))}.'
  return f'unknown {what} {word!r}: {hint}'


def _to_dict(node: Any) -> Any:
  if dataclasses.is_dataclass(node):
    return {f.name: _to_dict(getattr(node, f.name)) for f in dataclasses.fields(node)}
  return node


def _from_dict(node: Any, values: Any, path: str) -> Any:
  """`node` with the fields that `values` names replaced, types checked against the defaults."""
  if not isinstance(values, dict):
    raise UserError(f'{path} must be a group of settings, not {values!r}')
  fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
  changes = {}
  for key, value in values.items():
    name = f'{path}.{key}' if path else key
    if key not in fields:
      raise UserError(unknown(f'config key in {path or "the config"}', key, fields))
    old = fields[key]
    if dataclasses.is_dataclass(old):
      changes[key] = _from_dict(old, value, name)
      continue
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
      value = tuple(value)
    if type(value) is not type(old):
      raise UserError(f'{name} must be of type {type(old).__name__}, not {value!r}')
    changes[key] = value
  return dataclasses.replace(node, **changes)


def _check(c: Config) -> None:
  at_least = {
    'steps': (c.steps, 1),
    'microbatch': (c.microbatch, 1),
    'head_tile': (c.head_tile, 0),
    'rollout.prompts': (c.rollout.prompts, 1),
    'rollout.samples': (c.rollout.samples, 1),
    'rollout.prompts_at_once': (c.rollout.prompts_at_once, 0),
    'rollout.slots': (c.rollout.slots, 0),
    'evaluation.records': (c.evaluation.records, 0),
    'evaluation.stop_at': (c.evaluation.stop_at, 0.0),
    'rollout.max_new_tokens': (c.rollout.max_new_tokens, 1),
    'data.max_prompt_tokens': (c.data.max_prompt_tokens, 1),
    'data.prompt_bucket': (c.data.prompt_bucket, 1),
    'data.patch_bucket': (c.data.patch_bucket, 1),
    'data.min_pixels': (c.data.min_pixels, 0),
    'data.max_pixels': (c.data.max_pixels, 0),
    'optimizer.learning_rate': (c.optimizer.learning_rate, 0.0),
    'optimizer.warmup_steps': (c.optimizer.warmup_steps, 0),
    'optimizer.weight_decay': (c.optimizer.weight_decay, 0.0),
    'optimizer.clip_norm': (c.optimizer.clip_norm, 0.0),
    'checkpoint.every': (c.checkpoint.every, 1),
    'checkpoint.keep': (c.checkpoint.keep, 1),
    'evaluation.every': (c.evaluation.every, 0),
    'log.every': (c.log.every, 1),
    'student.keep_every': (c.student.keep_every, 1),
  }
  for name, (value, least) in at_least.items():
    if not value >= least:
      raise UserError(f'{name} must be at least {least}, not {value}')
  one_of = {
    'data.privileged': (c.data.privileged, ('column', 'none')),
    'data.on_too_long': (c.data.on_too_long, ('drop', 'error')),
    'freeze': (c.freeze, ('nothing', 'vision', 'tower', 'merger')),
    'rollout.kv_cache': (c.rollout.kv_cache, ('compute', 'int8')),
    'compute_dtype': (c.compute_dtype, ('auto', 'float32', 'bfloat16')),
  }
  for name, (value, allowed) in one_of.items():
    if value not in allowed:
      raise UserError(f'{name} must be one of {", ".join(allowed)}, not {value!r}')
  if c.rollout.prompts_at_once and c.rollout.prompts % c.rollout.prompts_at_once:
    raise UserError(
      f'rollout.prompts ({c.rollout.prompts}) must be a multiple of rollout.prompts_at_once '
      f'({c.rollout.prompts_at_once})'
    )
  if c.evaluation.stop_at > 1:
    raise UserError(f'evaluation.stop_at is a share, from 0 to 1, not {c.evaluation.stop_at}')
  if c.evaluation.stop_at and not (c.data.eval and c.evaluation.every):
    raise UserError('evaluation.stop_at needs data.eval and evaluation.every to look at')
  if c.rollout.lag not in (0, 1):
    raise UserError(f'rollout.lag must be 0 or 1, not {c.rollout.lag}')
  _check_objective(c)
  if c.optimizer.warmup_steps >= c.steps:
    raise UserError(
      f'optimizer.warmup_steps ({c.optimizer.warmup_steps}) must be below steps ({c.steps})'
    )
  if not all(_is_pair(x, str, str) for x in c.data.columns):
    raise UserError("data.columns must be pairs of names: (('prompt', 'question'), ...)")
  if not all(_is_pair(x, str, int) for x in c.data.stages):
    raise UserError("data.stages must be pairs of a source and steps: (('a.jsonl', 100), ...)")
  for setting, pairs, what in (
    ('teachers', c.teachers, "a path: (('math', 'DIR'), ...)"),
    ('data.evals', c.data.evals, "a source: (('math', 'a.jsonl'), ...)"),
  ):
    if len({x[0] for x in pairs if _is_pair(x, str, str) and all(x)}) < len(pairs):
      raise UserError(f'{setting} must be pairs of a name of its own and {what}')
  if c.student.offload or tuple(c.student.split_over) != ('fsdp', 'tensor'):
    raise UserError(
      'student.offload and student.split_over must stay as they are: what trains lies as its '
      "optimizer's state does; set the teacher's"
    )
  for kind in ('teacher', 'reference'):
    for axis in getattr(c, kind).split_over:
      if axis not in ('fsdp', 'tensor'):
        raise UserError(f'{kind}.split_over may name fsdp and tensor, not {axis!r}')
  family, _, part = c.checkpoint.best.rpartition('/')
  of_a_set = family in glossary.METRICS and part not in dict(c.data.evals)
  if c.checkpoint.best and (of_a_set or not glossary.metric(c.checkpoint.best).meaning):
    raise UserError(unknown('metric in checkpoint.best', c.checkpoint.best, glossary.METRICS))
  if bool(c.data.train) == bool(c.data.stages):
    raise UserError('set either data.train (one source) or data.stages (a curriculum)')


def _check_objective(c: Config) -> None:
  objective = c.objective.build()
  name, samples = objective.name, c.rollout.samples
  if samples < objective.least_samples:
    raise UserError(
      f'{name} compares the completions of one prompt: rollout.samples must be at least '
      f'{objective.least_samples}, not {samples}'
    )
  for rows in rows_of_batches(c, objective):
    share = rows // objective.updates
    if rows % objective.updates or share % micro_batches(share, c.microbatch):
      updates = f'{objective.updates} updates of ' if objective.updates > 1 else ''
      raise UserError(
        f'{rows} rows (rollout.prompts * rollout.samples, or prompts where the data complete them) '
        f"can't be cut into {updates}equal micro-batches of at most {c.microbatch} rows: change "
        'one of these numbers'
      )
  if c.rollout.lag and objective.source == 'data':
    raise UserError(
      f'{name} trains on the completions of the data, and no rollout can be sampled ahead: '
      'set rollout.lag=0'
    )
  if c.teachers and c.teacher.path:
    raise UserError('set either teacher.path (one teacher) or teachers (several), not both')


def _is_pair(x: Any, first: type, second: type) -> bool:
  both = isinstance(x, list | tuple) and len(x) == 2
  return both and type(x[0]) is first and type(x[1]) is second
