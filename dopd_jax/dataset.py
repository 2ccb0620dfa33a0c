"""From what a config says to examples: sources, tasks, chat rendering, length limits."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dopd_jax import sight, tasks, teachers
from dopd_jax.config import Config
from dopd_jax.data import (
  DEFAULT_TEMPLATE,
  Example,
  Pipeline,
  Record,
  Renderer,
  make_pipeline,
  open_source,
  tokenise,
  view_grids,
)
from dopd_jax.errors import UserError
from dopd_jax.objectives import Objective
from dopd_jax.policies import Pair

LOADERS = {'task': tasks.load}
HeldOut = Mapping[str, Sequence[Example]]  # '' is that of data.eval


def renderer(config: Config, pair: Pair) -> Renderer:
  """How prompts become ids, for every policy."""
  template = config.data.privileged_template or DEFAULT_TEMPLATE
  inputs = pair.sight.inputs if pair.sight else None
  return Renderer(pair.tokenizer, template, config.data.thinking, images=inputs)


def open_pipeline(config: Config, pair: Pair, objective: Objective) -> Pipeline:
  """The shuffled, resumable batches of the run; raises `UserError` as the parts do."""
  data = config.data
  pipeline = make_pipeline(
    data.stages or ((data.train, None),),
    renderer(config, pair),
    batch_size=config.rollout.prompts,
    seed=config.seed,
    max_prompt_tokens=data.max_prompt_tokens,
    max_completion_tokens=_completion_limit(config, objective),
    on_too_long=data.on_too_long,
    privileged=_privileged(config, objective),
    columns=dict(data.columns),
    loaders=LOADERS,
    privileged_kind=data.privileged_kind,
    box_format=data.box_format,
    image_folder=data.image_folder,
  )
  if pipeline.length is not None and pipeline.length < config.steps:
    raise UserError(
      f'data.stages last {pipeline.length} steps and steps is {config.steps}: make them equal'
    )
  records = [example.record for example in pipeline.examples()]
  check_views(config, pair, objective, list(pipeline.examples()))
  for record in records:
    if objective.source != 'student' and record.completion is None:
      raise UserError(
        f'record {record.id}: there is no completion, and {objective.name} trains on it; add '
        'this column, or name yours in data.columns'
      )
    if objective.rewards and not record.verifier:
      raise UserError(
        f'record {record.id} names no verifier, and {objective.name} needs to know which '
        'completions are right: add the column verifier (and answer), or choose another objective'
      )
  if objective.source != 'data':
    check_verifiers(records)
  if _privileged(config, objective) == 'column' and not any(
    (record.privileged_context or '').strip() for record in records
  ):
    raise UserError(
      f'{objective.name} shows a hint, and every privileged_context of the data is blank: fill '
      "this column, name yours in data.columns, or set data.privileged='none' to train without"
    )
  if config.teachers and 'teacher' in objective.weights:
    teachers.check_records(records, [name for name, _ in config.teachers])
  return pipeline


def digests(config: Config, pipeline: Pipeline, held_out: HeldOut) -> dict[str, str]:
  """A hash of all that the records of each setting say, for `check_same`."""
  train = 'data.stages' if config.data.stages else 'data.train'
  sets = {_setting(name): _digest(examples) for name, examples in held_out.items()}
  return {train: _digest(pipeline.examples()), **sets}


def check_same(before: Mapping[str, str], now: Mapping[str, str]) -> None:
  """Raises `UserError` where the records of a run are no longer those that it began with.

  What a checkpoint from before there were digests does not name, is not compared.
  """
  for name, digest in before.items():
    if now.get(name) != digest:
      raise UserError(
        f'the records of {name} are not those that this run began with: bring the file back as '
        'it was, or start in a new workdir'
      )


def _digest(examples: Iterable[Example]) -> str:
  """Of records, whatever file they came from; of images the bytes, not the path."""
  digest = hashlib.sha256()
  for example in examples:
    said = {**vars(example.record), 'images': example.digest, 'ids': example.prompt_ids}
    digest.update(json.dumps(said, skipkeys=True, default=_plain).encode() + b'\n')
  return digest.hexdigest()


def _plain(value: Any) -> Any:
  """Of what JSON has no word for, what is the same in every process."""
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  if isinstance(value, set | frozenset):
    return sorted(map(str, value))
  return value.hex() if isinstance(value, bytes) else type(value).__name__


def check_views(config: Config, pair: Pair, objective: Objective, examples: list[Example]) -> None:
  """Raises `UserError` where a view needs boxes and has none, or makes a prompt too long."""
  if pair.sight is not None:
    for view in objective.images:
      for example in examples:
        view_grids(example, pair.sight.inputs.processor, view)
  for name in objective.prompts:
    if name.endswith('+crop'):
      limit = config.data.max_prompt_tokens
      for example, ids in zip(
        examples, sight.ids(examples, name, pair.sight, renderer(config, pair))
      ):
        if len(ids) > limit:
          raise UserError(
            f'record {example.record.id}: the prompt with the crop of its image has {len(ids)} '
            f'tokens and data.max_prompt_tokens is {limit}; raise it or remove the record'
          )


def check_verifiers(records: Sequence[Record]) -> None:
  """Raises `UserError` for a verifier that does not exist or can't judge, before any step."""
  tried = set()
  for record in records:
    if record.verifier and record.verifier not in tried:
      tasks.verify(record, '')
      tried.add(record.verifier)
    if record.verifier == 'exact' and record.answer is None:
      raise UserError(f'record {record.id}: the verifier exact needs an answer; add this column')


def open_held_out(config: Config, pair: Pair) -> HeldOut:
  """The examples of `data.eval`, under '', and of `data.evals` by name.

  Raises: UserError if a record names no verifier.
  """
  sources = {'': config.data.eval, **dict(config.data.evals)}
  return {name: _held_out(config, pair, name, source) for name, source in sources.items()}


def _setting(name: str) -> str:
  return f'data.evals.{name}' if name else 'data.eval'


def _held_out(config: Config, pair: Pair, name: str, source: str) -> list[Example]:
  data = config.data
  if not source:
    return []
  examples = tokenise(
    open_source(
      source,
      privileged='none',
      columns=dict(data.columns),
      loaders=LOADERS,
      image_folder=data.image_folder,
    ),
    renderer(config, pair),
    max_prompt_tokens=data.max_prompt_tokens,
    on_too_long=data.on_too_long,
    name=source,
  ).examples
  for example in examples:
    if not example.record.verifier:
      raise UserError(
        f'record {example.record.id} of {_setting(name)} names no verifier: accuracy needs one'
      )
  check_verifiers([example.record for example in examples])
  return examples[: config.evaluation.records or None]


def _completion_limit(config: Config, objective: Objective) -> int | None:
  return config.rollout.max_new_tokens if objective.source != 'student' else None


def _privileged(config: Config, objective: Objective) -> str:
  """A method that shows nobody the hint does not ask the data for it."""
  return config.data.privileged if 'privileged' in objective.contexts else 'none'
