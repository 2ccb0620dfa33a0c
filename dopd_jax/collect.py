r"""A rollout batch from prompts: completions, then what the objective wants to know of them.

start     prompts -> completions   sampled by the student, or those of the data
complete          -> rewards       where the objective asks for them
                  -> contexts      where a prompt is made of other completions

`start` waits for no device, except for the coin of a mixed source, and `complete` for this rollout
alone. Where `rollout.lag` asks for it, `Ahead` starts the batch of the next step before it
completes the one of this step.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dopd_jax import collate, dataset, evaluation, policies, sharding, sight, teachers
from dopd_jax.config import Config, micro_batches
from dopd_jax.data import Example, Pipeline, Renderer
from dopd_jax.objectives import Objective
from dopd_jax.policies import Pair
from dopd_jax.rollout import Rollout, Sampling, sampling_notes
from dopd_jax.step import Batch, Prompt

_COIN = 2**31  # folded into the run's key beside steps, which are smaller


class Collected(NamedTuple):
  """A rollout batch; `examples` has one for each row, of all processes."""

  examples: list[Example]
  rollout: Rollout
  batch: Batch
  sampled: bool  # by the student, not from the data


class Started(NamedTuple):
  """A rollout batch that the devices may still be sampling; without a rollout, one of the data."""

  examples: Sequence[Example]  # one a prompt
  prompts: dict[str, Prompt] | None = None  # on the host
  images: Any = None  # `Batch.images`
  rollout: Rollout | None = None


class Collect(NamedTuple):
  """How the rollout batch of a step is made; the same whenever it is asked for.

  A rollout that `start` is given, from a checkpoint, stands for the one that it would sample.
  """

  start: Callable[..., Started]  # (params, examples, step, rollout=None)
  complete: Callable[[Started], Collected]

  def __call__(self, params: Any, examples: Sequence[Example], step: int) -> Collected:
    """Both halves, one after the other."""
    return self.complete(self.start(params, examples, step))


def make_collect(config: Config, pair: Pair, objective: Objective, mesh: Any) -> Collect:
  """The two halves of a rollout batch for one config, objective and mesh."""
  r = config.rollout
  run_key = jax.random.key(config.seed)
  sample = make_sample(config, pair, objective, mesh)
  renderer = dataset.renderer(config, pair)
  given_prompts = sorted(objective.prompts - {'sibling'})

  def prompts(examples, names, room=0):
    bucket, pad_id = config.data.prompt_bucket, pair.pad_id
    return collate.prompts(examples, names, bucket, pad_id, 0, pair.sight, renderer, room)

  def look(examples):
    return collate.put(sight.images(examples, objective.images, pair.sight, mesh), mesh)

  def batch_of(rows, by_context, images, rollout, supervised=None, reward: Any = None):
    several = pair.given.get('teacher', {})
    teacher_rows: Any = None
    if several and '' not in several:
      size = len(rows)
      at_once = size // micro_batches(size, config.microbatch)
      teacher_rows = teachers.rows_by_teacher([e.record for e in rows], sorted(several), at_once)
    by_context, reward = collate.put((by_context, reward), mesh)
    return collate.as_batch(by_context, rollout, supervised)._replace(
      images=images, reward=reward, teacher_rows=teacher_rows
    )

  def samples(step):
    """Whether the student writes the completions of a step."""
    if objective.source != 'mixed':
      return objective.source == 'student'
    coin = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(run_key, _COIN), step))
    return coin < objective.on_policy_share

  def start(params, examples, step, rollout=None):
    if not samples(step):
      return Started(examples)
    by_context, images = prompts(examples, given_prompts), look(examples)
    if rollout is None:
      rollout = sample(params, by_context, images, examples, step)
    return Started(examples, by_context, images, rollout)

  def from_data(examples):
    by_context = prompts(examples, given_prompts)
    by_context = collate.choose_context(
      by_context, examples, objective.privileged_share, config.seed
    )
    completions = collate.fixed_completions(examples, r.max_new_tokens, pair.pad_id)
    rollout, supervised = collate.put(completions, mesh)
    rows = list(examples)
    batch = batch_of(rows, by_context, look(examples), rollout, supervised)
    return Collected(rows, rollout, batch, False)

  def from_student(examples, by_context, images, rollout):
    rows = [e for e in examples for _ in range(r.samples)]
    by_context = collate.repeat(by_context, r.samples)
    if not objective.rewards:
      return Collected(rows, rollout, batch_of(rows, by_context, images, rollout), True)

    own, texts, judged = evaluation.own_rewards(
      pair.tokenizer, rows, rollout.tokens, rollout.mask, mesh
    )
    reward, known = np.full(len(rows), np.nan, np.float32), [''] * len(rows)
    reward[own] = judged
    for row, text in zip(own, texts):
      known[row] = text
    supervised = rollout.mask
    if 'sibling' in objective.contexts:
      limit = policies.longest_prompt(config, objective)
      hinted, has = with_siblings(rows, known, reward >= objective.right_at, r.samples)
      hinted, has = rendered(renderer, hinted, has, limit)
      # No process knows how long the hints of the others are.
      room = limit if jax.process_count() > 1 else 0
      by_context['sibling'] = prompts(hinted, ['privileged'], room)['privileged']
      supervised &= collate.put(has, mesh)[:, None]
    batch = batch_of(rows, by_context, images, rollout, supervised, reward)
    return Collected(rows, rollout, batch, True)

  def complete(started):
    return from_data(started.examples) if started.rollout is None else from_student(*started)

  return Collect(start, complete)


class Ahead:
  """The rollout batches of a run, each sampled `config.rollout.lag` updates before its own.

  At step t it starts the batch of step t + lag and completes the one of step t. With lag 1 the
  devices then have the next rollout to do, and what is left of the update before, while the host
  decodes, judges and makes prompts. The images of the batch that waits lie on the devices.

  Args:
    collect: both halves of a batch.
    pipeline: where the examples come from.
    config: its `rollout` and `steps`; no batch is sampled beyond these.
    mesh: where rows lie.
  """

  def __init__(self, collect: Collect, pipeline: Pipeline, config: Config, mesh: Any):
    self._collect, self._pipeline = collect, pipeline
    self._config, self._mesh = config, mesh
    self._waiting: Started | None = None  # the batch of the next step
    self._position: dict[str, Any] | None = None  # in the data, from which that batch came

  def take(self, params: Any, step: int) -> Collected:
    """The batch of `step`, to be called once a step and before the update donates `params`.

    Args:
      params: the student before the update of `step`. They sample the batch of step + lag, and at
        the first step of a run its own batch too.
      step: from 1.
    """
    started = self._waiting or self._start(params, step)
    self._waiting, self._position = None, None
    if self._config.rollout.lag and step < self._config.steps:
      self._position = self._pipeline.get_state()
      self._waiting = self._start(params, step + 1)
    return self._collect.complete(started)

  def lag(self, step: int) -> int:
    """Updates between the sampling of the batch of `step` and the training on it."""
    return min(step - 1, self._config.rollout.lag)

  @property
  def rollout(self) -> Rollout | None:
    """What a checkpoint must hold as arrays: the completions of the batch that waits, if any."""
    return self._waiting.rollout if self._waiting else None

  @property
  def abstract(self) -> Rollout:
    """Shapes, dtypes and shardings of a `rollout`: what a checkpoint is read into."""
    r, rows = self._config.rollout, sharding.rows(self._mesh)
    B, N = r.prompts * r.samples, r.max_new_tokens
    array: Any = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    return Rollout(
      tokens=array(np.int32, B, N),
      mask=array(np.bool_, B, N),
      logp=array(np.float32, B, N),
      behaviour_logp=array(np.float32, B, N),
      stop_reason=array(np.int32, B),
    )

  def get_state(self) -> dict[str, Any]:
    """Plain JSON: where the data go on (`data`), and whence the batch that waits came (`ahead`)."""
    return {'data': self._pipeline.get_state(), 'ahead': self._position}

  def set_state(self, state: Mapping[str, Any], rollout: Rollout | None, done: int) -> None:
    """Goes on after step `done` from what `get_state` and `rollout` gave.

    Raises:
      UserError: the state is of other data, another batch size or another seed.
    """
    self._position = state['ahead']
    if self._position is not None:
      self._pipeline.set_state(self._position)
      self._waiting = self._start(None, done + 1, rollout)
    self._pipeline.set_state(state['data'])

  def _start(self, params: Any, step: int, rollout: Rollout | None = None) -> Started:
    return self._collect.start(params, next(self._pipeline), step, rollout)


def make_rollout(config: Config, pair: Pair, objective: Objective) -> Callable:
  """The student's sampler with the settings of a run: `evaluation.make_generate`."""
  r = config.rollout
  sampling = Sampling(
    max_new_tokens=r.max_new_tokens,
    num_samples=r.samples,
    temperature=r.temperature,
    top_k=r.top_k,
    top_p=r.top_p,
    min_p=r.min_p,
    loss_temperature=objective.temperature,
    slots=r.slots,
    kv_cache=r.kv_cache,
  )
  for note in sampling_notes(pair.student.generation_config, sampling):
    logging.info('%s', note)
  return evaluation.make_generate(pair.student.model, sampling, pair, r.gather_weights)


def make_sample(config: Config, pair: Pair, objective: Objective, mesh: Any) -> Callable:
  """(params, prompts by name, images by view, examples, step) -> a Rollout on the mesh."""
  generate = make_rollout(config, pair, objective)
  run_key = jax.random.key(config.seed)

  def sample(params, by_context, images, examples, step):
    own = (images or {}).get(objective.student.image)
    index = np.array([e.draw for e in examples], np.uint32)
    key = jax.random.fold_in(run_key, step)
    once = config.rollout.prompts_at_once or len(examples)
    parts = []
    for i in range(0, len(examples), once):
      part = slice(i, i + once)
      prompt = jax.tree.map(lambda x, part=part: x[part], by_context[objective.student.prompt])
      prompt, numbers = collate.put((prompt, index[part]), mesh)
      shown = jax.tree.map(lambda x, part=part: x[part], own) if len(index) > once else own
      parts.append(generate(params, prompt, key, numbers, shown))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  return sample


def with_siblings(
  examples: Sequence[Example], texts: Sequence[str], right: np.ndarray, samples: int
) -> tuple[list[Example], np.ndarray]:
  """Each row's record with a right completion of the same prompt as its hint (SDPO).

  Args:
    examples: one a row, those of a prompt side by side.
    texts: of the completions.
    right: [B] bool, which may be a hint.
    samples: rows a prompt.

  Returns:
    The examples, their hints blank where there is no sibling, and which have one [B]. It is the
    next right one after the row itself, so that several are used alike; never the row's own.
  """
  hints = []
  for row in range(len(examples)):
    start, place = row - row % samples, row % samples
    others = [start + (place + i) % samples for i in range(1, samples)]
    hints.append(next((texts[i] for i in others if right[i] and texts[i].strip()), ''))
  hinted = [
    dataclasses.replace(e, record=dataclasses.replace(e.record, privileged_context=hint))
    for e, hint in zip(examples, hints)
  ]
  return hinted, np.array([bool(hint) for hint in hints])


def rendered(
  renderer: Renderer, examples: Sequence[Example], has: np.ndarray, limit: int
) -> tuple[list[Example], np.ndarray]:
  """The privileged prompts of new hints; a row whose prompt is over `limit` tokens has none."""
  ids = renderer.privileged_batch([e.record for e in examples])
  fits = np.array([len(x) <= limit for x in ids])
  chosen = [
    dataclasses.replace(e, privileged_ids=x if fit else e.prompt_ids)
    for e, x, fit in zip(examples, ids, fits)
  ]
  return chosen, has & fits
