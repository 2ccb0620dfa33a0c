"""Hugging Face directories in and out: safetensors <-> the stacked, sharded parameter tree.

`names` says which tensor is which leaf.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dopd_jax import sharding
from dopd_jax.errors import UserError
from dopd_jax.models.config import DecoderConfig, text_config
from dopd_jax.models.decoder import Params, build
from dopd_jax.models.names import Slot, slots

_NEVER_ZERO = ('embedding', 'final_norm', 'lm_head')
_DTYPES = ('F64', 'F32', 'F16', 'BF16')
_INDEX = 'model.safetensors.index.json'


class Tensor(NamedTuple):
  """A tensor that is still in its file."""

  file: str
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def load(
  path: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[DecoderConfig, Params]:
  """Reads a Hugging Face directory, or a hub name, into a parameter tree.

  One tensor at a time goes from its file to its layer on the devices: the host holds no more than
  that. Files may be float32, bfloat16 or float16. Stop ids are those of `generation_config.json`,
  then of `config.json`; nothing else of the former is used.

  Args:
    path: a directory with `config.json` and `*.safetensors`, or a name such as 'Qwen/Qwen3-0.6B'.
    mesh: where the tree goes, by the rules of `dopd_jax.sharding`; None: the default device.
    dtype: of the parameters.

  Raises: UserError, naming file and tensor, for a directory that is not a complete, finite,
    supported model.
  """
  directory = resolve(path)
  config = read_config(directory)
  with contextlib.ExitStack() as stack:
    return config, assemble(config, _open(directory, stack), mesh=mesh, dtype=dtype)


def resolve(path: str | os.PathLike) -> Path:
  """The local directory of a model: the path itself, or a snapshot of that name from the hub."""
  directory = Path(path).expanduser()
  if directory.is_dir():
    return directory
  if directory.is_file():
    hint = ': convert it with dopd_jax.models.gguf.convert' if directory.suffix == '.gguf' else ''
    raise UserError(f'{path} is a file, where a model directory is needed{hint}.')
  if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', str(path)):
    raise UserError(f'The model directory {path} does not exist: give a directory or a hub name.')
  import huggingface_hub  # not needed by whoever has a directory

  try:
    patterns = ['*.json', '*.safetensors', '*.jinja', '*.txt']
    return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
  except Exception as e:  # whatever the network, the hub or its cache raises
    reason = (str(e).strip() or type(e).__name__).split('\n')[0].rstrip('.')
    raise UserError(
      f'{path} is not a directory, and as a hub name it could not be downloaded ({reason}): '
      'give a local model directory.'
    ) from e


def read_config(directory: Path) -> DecoderConfig:
  """The decoder that `config.json` describes, with the stop ids of `generation_config.json`."""
  file = directory / 'config.json'
  hf = _read_json(file)
  if (directory / 'generation_config.json').exists():
    given = _read_json(directory / 'generation_config.json')
  else:
    given = None
  try:
    if given is not None:
      ids = [source.get('eos_token_id') for source in (given, hf, text_config(hf))]
      flat = [i for eos in ids for i in (eos if isinstance(eos, list) else [eos])]
      hf['eos_token_id'] = list(dict.fromkeys(i for i in flat if i is not None))
    return DecoderConfig.from_hf(hf)
  except UserError as e:
    raise UserError(f'{file}: {e}') from e
  except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as e:
    raise UserError(f'{file} holds a value of the wrong kind ({e}): download it again.') from e


def _read_json(file: Path) -> dict[str, Any]:
  try:
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
      raise ValueError('no object')
    return content
  except FileNotFoundError as e:
    raise UserError(f'{file} does not exist: give a Hugging Face model directory.') from e
  except (ValueError, RecursionError) as e:
    raise UserError(f'{file} is not valid JSON ({e}): download or copy it again.') from e


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
  """Every tensor of the directory's safetensors files, by name, unread."""
  sharded = (directory / _INDEX).exists()
  listed = _read_json(directory / _INDEX).get('weight_map', {}) if sharded else {}
  # A name with a folder in it would lead to files that are not part of the model.
  if not isinstance(listed, dict) or any(
    not isinstance(name, str) or Path(name).name != name for name in listed.values()
  ):
    raise UserError(f'{directory / _INDEX} does not name files of its folder: download it again.')
  files = sorted(set(listed.values())) if sharded else ['model.safetensors']
  tensors: dict[str, Tensor] = {}
  for file in (directory / name for name in files):
    if not os.path.exists(file):
      raise UserError(f'The weight file {file} does not exist: download or copy it again.')
    try:
      opened = stack.enter_context(safe_open(file, framework='np'))
    except (SafetensorError, OSError) as e:
      raise UserError(
        f'{file} is not a complete safetensors file ({e}): download or copy it again.'
      ) from e
    for name in opened.keys():  # noqa: SIM118  (a file, not a dict)
      if name in tensors:
        raise UserError(f'{name} is in both {tensors[name].file} and {file}: keep one of them.')
      about = opened.get_slice(name)
      if about.get_dtype() not in _DTYPES:
        raise UserError(
          f'{name} in {file} is of type {about.get_dtype()}: use weights that are not quantised.'
        )
      read = functools.partial(opened.get_tensor, name)
      tensors[name] = Tensor(str(file), tuple(about.get_shape()), read)
  absent = [name for name in listed if name not in tensors]
  if absent:
    raise UserError(f'{directory / _INDEX} lists {_few(absent)}, which no file holds: copy again.')
  return tensors


def assemble(
  config: DecoderConfig,
  tensors: Mapping[str, Tensor],
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: Any = jnp.float32,
) -> Params:
  """The parameter tree of tensors under their Hugging Face names. Raises as `load` does."""
  shapes = _shapes(config)
  where = {} if mesh is None else _flatten(sharding.param_shardings(_nest(shapes), mesh))
  leaves = {}
  for slot, tensor in _match(config, tensors):
    spread = where.get(slot.leaf)
    value = _read(slot, tensor).astype(dtype, copy=False)
    if slot.layer is None:
      leaves[slot.leaf] = _place(value, spread)
      continue
    if slot.layer == 0:
      leaves[slot.leaf] = jnp.zeros(shapes[slot.leaf].shape, dtype, device=spread)
    one = spread and jax.NamedSharding(spread.mesh, jax.P(*spread.spec[1:]))
    value = _place(value, one)
    leaves[slot.leaf] = _set_layer(leaves[slot.leaf], value, np.int32(slot.layer), spread)
  return _nest(leaves)


def _place(value: np.ndarray, spread: jax.sharding.Sharding | None) -> jax.Array:
  """On several processes `device_put` would send the whole array around to compare it."""
  if spread is None:
    return jax.device_put(value)
  return jax.make_array_from_callback(value.shape, spread, lambda part: value[part])


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _set_layer(stacked, value, i, spread):
  stacked = jax.lax.dynamic_update_index_in_dim(stacked, value, i, 0)
  return stacked if spread is None else jax.lax.with_sharding_constraint(stacked, spread)


def _match(config, tensors) -> list[tuple[Slot, Tensor]]:
  """Every slot with the one tensor that fills it. The prefix 'model.' may be absent."""
  wanted = {_short(slot.name): slot for slot in _slots(config)}
  found, unknown = {}, []
  for name, tensor in tensors.items():
    short = _short(name)
    if short in found:
      raise UserError(
        f'{found[short]} and {name} in {tensor.file} are the same parameter: keep one of them.'
      )
    if short in wanted:
      found[short] = name
      if tensor.shape != wanted[short].hf_shape:
        raise UserError(
          f'{name} in {tensor.file} has shape {tensor.shape}, but config.json makes it '
          f'{wanted[short].hf_shape}: use the config.json of these weights.'
        )
    # Old exports hold RoPE's buffers, and some a tied head written out.
    elif not name.endswith('rotary_emb.inv_freq') and name != 'lm_head.weight':
      unknown.append(name)
  if unknown:
    raise UserError(
      f'{_few(unknown)} in {tensors[unknown[0]].file} match no parameter of this '
      f'{config.model_type} with {config.num_hidden_layers} layers: use the weights of config.json.'
    )
  missing = [slot.name for short, slot in wanted.items() if short not in found]
  if missing:
    hint = ' (config.json says that the head is not tied)' if 'lm_head.weight' in missing else ''
    raise UserError(f'No weight file holds {_few(missing)}{hint}: download or copy them again.')
  if config.tie_word_embeddings and 'lm_head.weight' in tensors:
    table = next(found[short] for short, slot in wanted.items() if slot.leaf == 'embedding')
    head, table = tensors['lm_head.weight'], tensors[table]
    if head.shape != table.shape or not np.array_equal(head.read(), table.read()):
      raise UserError(
        f'lm_head.weight in {head.file} differs from the embedding, but config.json ties them: '
        'set tie_word_embeddings to false there, or remove the tensor.'
      )
  return [(slot, tensors[found[short]]) for short, slot in wanted.items()]


def _read(slot, tensor) -> np.ndarray:
  """One tensor as we hold it: float32, finite, heads unfolded."""
  value = tensor.read().astype(np.float32, copy=False)
  if not np.isfinite(value).all():
    raise UserError(
      f'{slot.name} in {tensor.file} holds NaN or infinite values: download it again, or use a '
      'checkpoint from before it diverged.'
    )
  if slot.leaf in _NEVER_ZERO and not value.any():
    raise UserError(
      f'{slot.name} in {tensor.file} is all zeros, which makes every prediction uniform: use '
      'weights that were trained.'
    )
  return slot.from_hf(value)


def save(
  directory: str | os.PathLike,
  config: DecoderConfig,
  params: Params,
  *,
  tokenizer: Any = None,
  max_shard_bytes: float = 5e9,
) -> None:
  """Writes a Hugging Face directory: safetensors, both configs and the tokenizer, all or nothing.

  It is written beside `directory` and renamed at the end. A tied head is one tensor, the embedding.

  Args:
    directory: must not exist, or be empty.
    config: of the parameters.
    params: arrays that this process can read; written in their own dtype.
    tokenizer: anything with `save_pretrained`, or None.
    max_shard_bytes: above it, several files and an index.

  Raises: UserError if the directory is not empty or cannot be written.
  """
  target = Path(directory).expanduser().absolute()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f'{target} exists and is not an empty directory: choose another, or remove it.')
  partial = target.with_name(f'.{target.name}.partial-{os.getpid()}')
  try:
    partial.mkdir(parents=True)
    _write_configs(partial, config, params['embedding'].dtype)
    _write_weights(partial, config, params, max_shard_bytes)
    if tokenizer is not None:
      tokenizer.save_pretrained(partial)
    partial.rename(target)
  except (OSError, SafetensorError) as e:
    raise UserError(f'{target} could not be written ({e}): free or choose another disk.') from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_configs(directory, config, dtype):
  hf = config.to_hf() | {'dtype': jnp.dtype(dtype).name}
  generation = {k: text_config(hf)[k] for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
  for file, content in (('config.json', hf), ('generation_config.json', generation)):
    (directory / file).write_text(json.dumps(content, indent=2) + '\n')


def _write_weights(directory, config, params, max_shard_bytes):
  leaves = _flatten(params)
  shards, size, total = [[]], 0, 0
  for slot in _slots(config):
    nbytes = math.prod(slot.shape) * leaves[slot.leaf].dtype.itemsize
    if shards[-1] and size + nbytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(slot)
    size, total = size + nbytes, total + nbytes
  files = (
    ['model.safetensors']
    if len(shards) == 1
    else [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  )
  for file, shard in zip(files, shards):
    tensors = {slot.name: slot.to_hf(leaves[slot.leaf]) for slot in shard}
    save_file(tensors, directory / file, metadata={'format': 'pt'})
    # safetensors writes files that only their owner may read.
    shutil.copymode(directory / 'config.json', directory / file)
  if len(files) > 1:
    listed = {slot.name: file for file, shard in zip(files, shards) for slot in shard}
    index = {'metadata': {'total_size': total}, 'weight_map': listed}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _slots(config: DecoderConfig) -> list[Slot]:
  return list(slots(config, _shapes(config)))


def _shapes(config) -> dict[str, jax.ShapeDtypeStruct]:
  return _flatten(jax.eval_shape(build(config).init, jax.random.key(0)))


def _flatten(tree) -> dict[str, Any]:
  """{'layers/mlp/up_proj': leaf} from a nested dict."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = leaf
  return tree


def _short(name: str) -> str:
  return name.removeprefix('model.')


def _few(names: list[str]) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more
