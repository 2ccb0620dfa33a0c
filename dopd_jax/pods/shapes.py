"""A run as shapes: models, state and batches with dtypes and shardings, and nothing in memory.

`compile_check` compiles the steps of a run from these. Sizes of models on the hub are known from
`models.PRESETS`; a directory needs its `config.json` alone. Batches are the largest of the run.
"""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dopd_jax import models, policies, sharding, teachers
from dopd_jax import state as states
from dopd_jax.config import Config, Policy
from dopd_jax.errors import UserError
from dopd_jax.models.weights import read_config
from dopd_jax.objectives import Objective
from dopd_jax.policies import Loaded, Pair
from dopd_jax.rollout import Rollout, bucket_length
from dopd_jax.step import Batch, Prompt


class Vocabulary(NamedTuple):
  """Stands for a tokenizer whose files are not needed: as many tokens as the tables have rows."""

  size: int

  def __len__(self) -> int:
    return self.size


def pair(config: Config, mesh: Mesh, weights: Collection[str], platform: str) -> Pair:
  """As `policies.load_pair`, from sizes alone; parameters are `jax.ShapeDtypeStruct`.

  Raises:
    UserError: a model whose sizes are not known, or several teachers.
  """
  if config.teachers:
    raise UserError('several teachers take turns: check each by itself, with teacher.path')
  dtype = policies.compute_dtype(config.compute_dtype, platform)

  def load(policy: Policy, frozen: bool) -> Loaded:
    sizes = architecture(policy)
    model = models.build(sizes, compute_dtype=dtype, remat=config.remat)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    if frozen:
      params = jax.eval_shape(lambda params: models.held(params, dtype), params)
    where = sharding.param_shardings(params, mesh, policy.split_over)
    return Loaded(model, lying(params, where), None, {})

  student = load(config.student, frozen=False)
  given = {
    kind: {'': load(getattr(config, kind), frozen=True)}
    for kind in ('teacher', 'reference')
    if kind in weights
  }
  sizes = student.model.config
  vocabulary: Any = Vocabulary(sizes.vocab_size)
  pad_id = sizes.pad_token_id or 0
  return Pair(student, given, vocabulary, sizes.eos_token_ids, pad_id, None)


def resident(policy: Policy, loaded: Loaded) -> Any:
  """What of a given model stays on the devices while it does not score."""
  return teachers.head(loaded.model, loaded.params) if policy.offload else loaded.params


def architecture(policy: Policy) -> models.DecoderConfig:
  """The sizes of a policy, from a preset of that name or from the `config.json` of its directory.

  Raises:
    UserError: neither is there.
  """
  name = policy.path.rpartition('/')[2].lower()
  name = re.sub('-(instruct|base)$', '', name)
  if name in models.PRESETS:
    sizes = models.PRESETS[name]
  elif re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', policy.path) or not policy.path:
    raise UserError(
      f'the sizes of {policy.path or "a model without a path"} are not known: give a directory '
      f'with its config.json, or one of {", ".join(models.PRESETS)}'
    )
  else:
    sizes = read_config(policies.locate(policy))
  kept = range(0, sizes.num_hidden_layers, policy.keep_every)
  return dataclasses.replace(sizes, num_hidden_layers=len(kept))


def state(pair: Pair, tx: Any, objective: Objective, mesh: Mesh) -> states.TrainState:
  """The training state."""
  made = jax.eval_shape(lambda p: states.create(p, tx, objective), pair.student.params)
  return lying(made, states.shardings(made, mesh))


def prompts(config: Config, objective: Objective, pair: Pair, mesh: Mesh) -> dict[str, Prompt]:
  """The longest prompts of each rendering, one a prompt: [b, P]."""
  rows, found = _rows(mesh), {}
  b = config.rollout.prompts
  for name in sorted(objective.prompts | {objective.student.prompt}):
    longest = config.data.max_prompt_tokens
    if name.startswith('sibling'):
      longest = policies.longest_prompt(config, objective)
    P = bucket_length(longest, config.data.prompt_bucket)
    seen = pair.student.model.config.vision is not None
    positions = rows(jnp.int32, b, P, 3) if seen else None
    found[name] = Prompt(rows(jnp.int32, b, P), rows(jnp.int32, b), positions)
  return found


def images(config: Config, objective: Objective, pair: Pair, mesh: Mesh) -> Any:
  """One image of the largest size a prompt, by view; None for models that read text alone.

  Raises:
    UserError: the largest size is not in the config.
  """
  vision = pair.student.model.config.vision
  if vision is None:
    return None
  pixels, side = config.data.max_pixels, vision.patch_size
  if not pixels:
    raise UserError('the largest image is not known: set data.max_pixels')
  P = bucket_length(pixels // side**2, config.data.patch_bucket)
  rows, b = _rows(mesh), config.rollout.prompts
  one = models.Images(rows(jnp.float32, b, 1, P, vision.patch_values), rows(jnp.int32, b, 1, 3))
  return dict.fromkeys(sorted(objective.images), one)


def rollout(config: Config, objective: Objective, mesh: Mesh) -> Rollout:
  """The completions: [B, N]."""
  r, rows = config.rollout, _rows(mesh)
  B, N = r.prompts * (1 if objective.source == 'data' else r.samples), r.max_new_tokens
  ids, logp = rows(jnp.int32, B, N), rows(jnp.float32, B, N)
  return Rollout(ids, rows(jnp.bool_, B, N), logp, logp, rows(jnp.int32, B))


def batch(
  config: Config, objective: Objective, mesh: Mesh, by_context: Any, images: Any, rollout: Rollout
) -> Batch:
  """What `score` and `update` see of the completions `rollout` of these prompts and images."""
  B = rollout.tokens.shape[0]
  wide = lambda x: jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype, sharding=x.sharding)
  reward: Any = _rows(mesh)(jnp.float32, B) if objective.rewards else None
  return Batch(
    jax.tree.map(wide, by_context),
    rollout.tokens,
    rollout.mask,
    rollout.mask,
    rollout.logp,
    reward,
    images,
  )


def lying(tree: Any, where: Any) -> Any:
  """Shapes with shardings."""
  one = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
  return jax.tree.map(one, tree, where)


def bytes_a_device(tree: Any) -> int:
  """What arrays of these shapes and shardings take on one device."""
  one = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(one, jax.tree.leaves(tree)))


def _rows(mesh: Mesh) -> Any:
  """(dtype, *shape) -> an array's shape with its rows split; it stands where types say Array."""
  where = sharding.rows(mesh)
  return lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
