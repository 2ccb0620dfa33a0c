"""From records to batches: tokenised ahead, shuffled, staged, sharded by process, exactly
resumable.

The order of the examples is a function of the seed and of the number of batches taken so far. That
number is the whole state, the same for all processes, so that a run goes on with another process
count where it stopped. Batches are global: process p takes the p-th slice of each.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging

from dopd_jax.data.chat import Renderer
from dopd_jax.data.image_inputs import examine_all, with_context
from dopd_jax.data.image_processor import Grid
from dopd_jax.data.images import Size
from dopd_jax.data.records import Record
from dopd_jax.data.sources import Loader, open_source
from dopd_jax.errors import UserError

_CHUNK = 1024  # records rendered in one call of the tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
  """A record as token ids.

  Attributes:
    index: position of the record in its source, stable whatever is dropped or shuffled.
    record: the record itself.
    prompt_ids: the plain prompt, generation prompt included.
    privileged_ids: the privileged prompt; equal to `prompt_ids` where the context is blank.
    completion_ids: a given completion and its stop token, or None.
    completion_mask: which of `completion_ids` are trained on, from the column `completion_mask` of
      the data (one value a token, the stop token optional); None means all.
    draw: index + epoch * records in the source: a record drawn twice into one batch, at the turn of
      an epoch or where a batch is larger than the data, differs here. Fold this into sampling keys.
    images: where the record's images come from, not decoded; `example_images` gives their patches.
    grids: (t, h, w) of each image as both prompts have it: the full image.
    sizes: (width, height) of each image, pixels.
    digest: identity of the images, '' without any.
  """

  index: int
  record: Record
  prompt_ids: list[int]
  privileged_ids: list[int]
  completion_ids: list[int] | None = None
  completion_mask: list[bool] | None = None
  draw: int = 0
  images: tuple[Any, ...] = ()
  grids: tuple[Grid, ...] = ()
  sizes: tuple[Size, ...] = ()
  digest: str = ''


class Dropped(NamedTuple):
  """How many records were too long, by the first part found too long."""

  prompt: int = 0
  privileged: int = 0
  completion: int = 0

  @property
  def total(self) -> int:
    """All of them."""
    return sum(self)


class Tokenised(NamedTuple):
  """The examples kept of a source, what was dropped, and how many records there were."""

  examples: list[Example]
  dropped: Dropped
  size: int
  name: str


def tokenise(
  records: Sequence[Record],
  renderer: Renderer,
  *,
  max_prompt_tokens: int,
  max_completion_tokens: int | None = None,
  on_too_long: str = 'drop',
  name: str = 'the data',
  privileged_kind: str = 'column',
) -> Tokenised:
  """Renders all records, and drops or refuses what is too long; nothing is ever cut.

  A prompt that is too long because of its images goes as a whole, with its images.

  Args:
    records: in the order that gives each its index.
    renderer: makes the ids.
    max_prompt_tokens: limit of the plain and of the privileged prompt.
    max_completion_tokens: limit of a given completion, its stop token included; None leaves given
      completions aside (`completion_ids` is None).
    on_too_long: 'drop', and count, or 'error'.
    name: of the data, in messages.
    privileged_kind: 'column' takes the contexts as they are, a key of `boxes.KINDS` makes them.

  Raises:
    UserError: on_too_long='error' and a record is too long; or nothing is left; or an image or a
      box is at fault.
  """
  if on_too_long not in ('drop', 'error'):
    raise UserError(f"data.on_too_long is 'drop' or 'error', not {on_too_long!r}.")
  examples, dropped, unknown = [], Dropped(), []
  rendered = _render_all(
    records, renderer, max_completion_tokens is not None, privileged_kind, max_prompt_tokens
  )
  for example in rendered:
    record = example.record
    if _has_unknown(example, renderer.tokenizer):
      unknown.append(record.id)
    lengths = (
      ('prompt', len(example.prompt_ids), max_prompt_tokens),
      ('privileged', len(example.privileged_ids), max_prompt_tokens),
      ('completion', len(example.completion_ids or []), max_completion_tokens or 0),
    )
    long = next((part for part in lengths if part[1] > part[2]), None)
    if long is None:
      examples.append(example)
      continue
    name_of_part, length, limit = long
    if on_too_long == 'error':
      key = 'rollout.max_new_tokens' if long is lengths[2] else 'data.max_prompt_tokens'
      part = 'privileged prompt' if long is lengths[1] else name_of_part
      raise UserError(
        f'Record {record.id}: the {part} has {length} tokens and {key} is {limit}; '
        "raise it, shorten the record, or set data.on_too_long='drop'."
      )
    dropped = dropped._replace(**{name_of_part: getattr(dropped, name_of_part) + 1})
  if unknown:
    logging.warning(
      '%d of %d records of %s have words that the tokenizer does not know; the first is %s.',
      len(unknown), len(records), name, unknown[0],
    )  # fmt: skip
  if not examples:
    raise UserError(
      f'All {len(records)} records of {name} are too long (prompt {dropped.prompt}, '
      f'privileged prompt {dropped.privileged}, completion {dropped.completion}): '
      'raise data.max_prompt_tokens or rollout.max_new_tokens.'
    )
  if dropped.total:
    logging.warning('Dropped %d of %d records of %s as too long: %s.',
                    dropped.total, len(records), name, dropped)  # fmt: skip
  return Tokenised(examples, dropped, len(records), name)


class Pipeline(Iterator[list[Example]]):
  """Batches of examples, stage after stage.

  Within a stage the examples come in a shuffled order, each once an epoch, and epochs follow each
  other without a gap: a batch may hold the end of one and the start of the next. A stage ends after
  its number of batches, and the next one starts with the following batch.

  Args:
    stages: (examples, number of batches) pairs; None batches, for the last stage only, is without
      end.
    batch_size: examples a batch, of all processes together: each process has the whole list, and
      makes arrays of its own rows.
    seed: of the order.

  Raises:
    UserError: an impossible number.
  """

  def __init__(
    self,
    stages: Sequence[tuple[Tokenised, int | None]],
    *,
    batch_size: int,
    seed: int,
  ):
    if batch_size < 1:
      raise UserError(f'A batch has at least 1 prompt, not {batch_size}.')
    if not (isinstance(seed, int) and seed >= 0):
      raise UserError(f'The seed of the data order is a whole number from 0, not {seed!r}.')
    if not stages:
      raise UserError('data.stages is empty: name at least one source.')
    for number, (_, steps) in enumerate(stages):
      if steps is None and number < len(stages) - 1:
        raise UserError(f'Stage {number} of data.stages needs a number of steps: others follow it.')
      if steps is not None and steps < 1:
        raise UserError(f'Stage {number} of data.stages has {steps} steps: give it at least 1.')
    self._stages = list(stages)
    self._orders = [
      _order(data.examples, seed, i, batch_size) for i, (data, _) in enumerate(stages)
    ]
    self._batch_size = batch_size
    self._fingerprint = _fingerprint(stages, batch_size, seed)
    self._taken = 0

  @property
  def length(self) -> int | None:
    """Batches in all stages together; None without end."""
    steps = [steps for _, steps in self._stages]
    return None if None in steps else sum(count for count in steps if count)

  @property
  def dropped(self) -> Dropped:
    """What was dropped as too long, over all sources (each counted once)."""
    sources = {id(data): data.dropped for data, _ in self._stages}.values()
    return Dropped(*(sum(counts) for counts in zip(*sources)))

  def examples(self) -> Iterator[Example]:
    """Every example of every source once."""
    for data in {id(data): data for data, _ in self._stages}.values():
      yield from data.examples

  def __next__(self) -> list[Example]:
    located = self._locate(self._taken)
    if located is None:
      raise StopIteration
    stage, step = located
    data = self._stages[stage][0]
    batch: Any = self._orders[stage][step]
    self._taken += 1
    start = step * self._batch_size
    return [
      dataclasses.replace(
        example,
        draw=example.index + (start + row) // len(data.examples) * data.size,
      )
      for row, example in enumerate(batch)
    ]

  def get_state(self) -> dict[str, Any]:
    """The position, as plain JSON; the same on every process."""
    return {'batches': self._taken, 'fingerprint': self._fingerprint}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from a position that `get_state` gave.

    Raises:
      UserError: the state is of other data, another batch size or another seed.
    """
    if state.get('fingerprint') != self._fingerprint:
      raise UserError(
        'The saved position in the data belongs to other data or stages, another batch size, '
        'tokenizer or seed: restore these, or start in a new workdir.'
      )
    self._taken = int(state['batches'])

  def _locate(self, batch: int) -> tuple[int, int] | None:
    for stage, (_, steps) in enumerate(self._stages):
      if steps is None or batch < steps:
        return stage, batch
      batch -= steps
    return None


def make_pipeline(
  stages: Sequence[tuple[str, int | None]],
  renderer: Renderer,
  *,
  batch_size: int,
  seed: int,
  max_prompt_tokens: int,
  max_completion_tokens: int | None = None,
  on_too_long: str = 'drop',
  privileged: str = 'column',
  columns: Mapping[str, str] | None = None,
  loaders: Mapping[str, Loader] | None = None,
  privileged_kind: str = 'column',
  box_format: str = 'absolute',
  image_folder: str = '',
) -> Pipeline:
  """Opens, tokenises and orders the sources of a curriculum: (source spec, number of batches)
  pairs.

  `open_source`, `tokenise` and `Pipeline` say what the arguments are and what they raise.
  """
  tokenised: dict[str, Tokenised] = {}
  for spec, _ in stages:
    if spec not in tokenised:
      tokenised[spec] = tokenise(
        open_source(
          spec,
          privileged=privileged,
          columns=columns,
          loaders=loaders,
          privileged_kind=privileged_kind,
          box_format=box_format,
          image_folder=image_folder,
        ),
        renderer,
        max_prompt_tokens=max_prompt_tokens,
        max_completion_tokens=max_completion_tokens,
        on_too_long=on_too_long,
        name=spec,
        privileged_kind='none' if privileged == 'none' else privileged_kind,
      )
  return Pipeline(
    [(tokenised[spec], steps) for spec, steps in stages],
    batch_size=batch_size,
    seed=seed,
  )


def pad_batch(
  rows: Sequence[Sequence[int]], length: int, pad_id: int, side: str = 'right'
) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows of ids to one length.

  Args:
    rows: B rows of at most `length` ids.
    length: T.
    pad_id: the id where there is no token.
    side: of the padding, 'left' or 'right'.

  Returns:
    tokens [B, T] int32, and valid [B, T] bool: which columns hold a token. Padding is told by
    place, never by id: the pad id may be the stop id.

  Raises:
    ValueError: a row is longer than `length`, or there is no such side.
  """
  if side not in ('left', 'right'):
    raise ValueError(f"side is 'left' or 'right', not {side!r}")
  tokens = np.full((len(rows), length), pad_id, np.int32)
  valid = np.zeros((len(rows), length), bool)
  for row, ids in enumerate(rows):
    if len(ids) > length:
      raise ValueError(f'row {row} has {len(ids)} ids, more than {length}')
    columns = slice(0, len(ids)) if side == 'right' else slice(length - len(ids), length)
    tokens[row, columns] = ids
    valid[row, columns] = True
  return tokens, valid


def _render_all(
  records: Sequence[Record],
  renderer: Renderer,
  with_completion: bool,
  privileged_kind: str,
  max_prompt_tokens: int,
) -> Iterator[Example]:
  for start in range(0, len(records), _CHUNK):
    chunk = [records[i] for i in range(start, min(start + _CHUNK, len(records)))]
    pictured = any(record.images for record in chunk)
    inputs = renderer.images if pictured else None
    pictures = list(examine_all(chunk, inputs, max_prompt_tokens))
    chunk = [with_context(r, privileged_kind, p.sizes) for r, p in zip(chunk, pictures)]
    grids: dict[str, Any] = {'grids': [p.grids for p in pictures]} if pictured else {}
    completions = renderer.completion_batch(chunk) if with_completion else [None] * len(chunk)
    plain = privileged = renderer.plain_batch(chunk, **grids)
    if any((record.privileged_context or '').strip() for record in chunk):
      privileged = renderer.privileged_batch(chunk, **grids)
    columns = zip(chunk, pictures, plain, privileged, completions)
    for index, (record, seen, prompt_ids, privileged_ids, completion_ids) in enumerate(
      columns, start
    ):
      if not prompt_ids:
        raise UserError(
          f'Record {record.id}: the prompt has no tokens; write one or remove the record.'
        )
      mask = _completion_mask(record, completion_ids)
      yield Example(
        index,
        record,
        prompt_ids,
        privileged_ids,
        completion_ids,
        mask,
        draw=index,
        images=record.images,
        grids=seen.grids,
        sizes=seen.sizes,
        digest=seen.digest,
      )


def _completion_mask(record: Record, ids: list[int] | None) -> list[bool] | None:
  mask = record.extra.get('completion_mask')
  if mask is None or ids is None:
    return None
  if not isinstance(mask, list) or any(value not in (0, 1) for value in mask):
    raise UserError(f'Record {record.id}: completion_mask is a list of 0 and 1.')
  mask = [bool(value) for value in mask]
  if len(mask) == len(ids) - 1:
    mask.append(True)
  if len(mask) != len(ids):
    raise UserError(
      f'Record {record.id}: completion_mask has {len(mask)} values for {len(ids)} completion '
      'tokens.'
    )
  return mask


def _has_unknown(example: Example, tokenizer) -> bool:
  unknown = tokenizer.unk_token_id
  # Some tokenizers name another token as the unknown one, and that is no sign of anything.
  if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
    return False
  ids = (example.prompt_ids, example.privileged_ids, example.completion_ids or [])
  return any(unknown in part for part in ids)


def _order(examples: list[Example], seed: int, stage: int, batch_size: int) -> grain.MapDataset:
  # Stages on the same data get orders of their own; grain wants 32 bits.
  grain_seed = int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])
  order = grain.MapDataset.source(examples).seed(grain_seed).shuffle().repeat()
  return order.batch(batch_size, drop_remainder=True, batch_fn=list)


def _fingerprint(stages: Sequence[tuple[Tokenised, int | None]], batch_size: int, seed: int) -> str:
  digest = hashlib.sha256(f'{batch_size} {seed}'.encode())
  for data, steps in stages:
    digest.update(f' stage {steps} {data.size} '.encode())
    for example in data.examples:
      parts = [example.prompt_ids, example.privileged_ids, example.completion_ids or []]
      for part in ([example.index], *parts):
        digest.update(np.array([len(part), *part], '<i8').tobytes())
      if example.digest:
        pictured = f'{example.digest} {example.grids} {example.record.boxes}'
        digest.update(pictured.encode())
  return digest.hexdigest()
