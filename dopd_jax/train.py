r"""The main job: distils a teacher into a student on the student's own completions.

  python -m dopd_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Read `train` from top to bottom:

  workdir    the config as it ran; a run that was cut off goes on by itself
  models     student, teacher and tokenizer on the mesh
  data       records -> chat -> batches; held-out records
  steps      collect, score, update: a rollout batch, what is known of it, one step of training
  resume     state and position in the data, from the newest checkpoint
  loop       collect, score, update; look; save. Rollouts may be one step ahead (`rollout.lag`)
  report     a table, report.png, samples.html
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags
from rich.console import Console
from rich.progress import Progress, TaskID

from dopd_jax import (
  checkpoint,
  cli,
  collate,
  dataset,
  distributed,
  evaluation,
  metrics,
  policies,
  probe,
  sharding,
  sight,
  teachers,
  token_records,
  workdirs,
)
from dopd_jax import config as configs
from dopd_jax import state as states
from dopd_jax.collect import Ahead, Collected, make_collect
from dopd_jax.config import Config
from dopd_jax.data import Example
from dopd_jax.errors import Stopped
from dopd_jax.objectives import Objective
from dopd_jax.policies import Pair
from dopd_jax.rollout import Sampling, StopReason
from dopd_jax.step import Batch, Scored, Steps, Updated, make_steps

FLAGS = flags.FLAGS


class InFlight(NamedTuple):
  """A rollout batch that the devices may still be working on."""

  step: int
  lag: int  # updates between its sampling and its own
  collected: Collected
  scored: Scored  # without its hidden states
  updated: Updated


def train(config: Config, workdir: str, console: Console | None = None) -> dict[str, float]:
  """Runs, or goes on with, the run of `workdir`; returns its last accuracies.

  Raises:
    UserError: something that the user must change.
    Stopped: a loss or a gradient was not finite.
  """
  console = console or Console(quiet=jax.process_index() > 0)
  objective = config.objective.build()

  # ------------------------------------------------------------------ workdir
  distributed.check_same('settings', f'{configs.to_json(config)} {os.path.abspath(workdir)}')
  workdirs.check(workdir, config)
  saves = checkpoint.Checkpoints(
    os.path.join(workdir, 'checkpoints'),
    config.checkpoint.keep,
    config.checkpoint.best,
    config.checkpoint.lower_is_better,
  )

  # ------------------------------------------------------------------ models
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  workdirs.check_rows(config, objective, mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    pair = policies.load_pair(config, mesh, probe.weights(config, objective))
    policies.check_context(config, objective, pair)
    sight.check(objective, pair.sight)

    # ---------------------------------------------------------------- data
    pipeline = dataset.open_pipeline(config, pair, objective)
    held_out = dataset.open_held_out(config, pair)
    records = dataset.digests(config, pipeline, held_out)
    distributed.check_same('data', json.dumps([pipeline.get_state(), records]))

    # ---------------------------------------------------------------- steps
    tx = states.optimizer(config.optimizer, config.steps, objective.updates, config.freeze)
    state = states.place(states.create(pair.student.params, tx, objective), mesh)
    given, resident = teachers.given(pair.given)
    pair = pair._replace(student=pair.student._replace(params=None))  # the state owns them now
    steps = compile_steps(config, pair, objective, tx, state)
    ahead = Ahead(make_collect(config, pair, objective, mesh), pipeline, config, mesh)
    judge = make_judge(config, pair, held_out, mesh, workdir)
    look_inside = probe.make_probe(config, pair, objective, steps)

    # ---------------------------------------------------------------- resume
    newest = saves.newest() if jax.process_index() == 0 else None
    done, last, ended = distributed.first(newest or 0), {}, False
    if done:
      state, run = saves.restore(done, states.abstract(state))
      dataset.check_same(run.get('records', {}), records)
      ahead.set_state(run, saves.restore_rollout(done, ahead.abstract), done)
      last, ended = run['accuracy'], run.get('ended', False)
      logging.info('Going on from step %d of %d.', done, config.steps)
    workdirs.claim(workdir, config)
    writer = metrics.Writer(workdir, done, config.log.tensorboard)
    stack.callback(writer.close)
    stopped = stack.enter_context(workdirs.stop_signal())
    progress = stack.enter_context(metrics.bar(console))
    if not done:
      last = judge(0, state.params, progress, given)
      if last:
        writer.write(0, last)

    # ---------------------------------------------------------------- loop
    task = progress.add_task('train', total=config.steps, completed=done, rate='-')
    clock = Clock()
    finished = lambda x: finish(config, objective, pair, mesh, x, clock, progress, task)
    pending: InFlight | None = None
    page: list[dict] = []
    for step in () if ended else range(done + 1, config.steps + 1):
      # With a lag this also starts the rollout of the next step. It must come before the update,
      # which donates the parameters that sample; a dispatch that holds them is safe.
      collected = ahead.take(state.params, step)
      # However old the completions are, the weights that score are those that the update starts
      # from, so that hidden states meet the head that they were made for.
      scored = steps.score(state, given, collected.batch, resident)
      state, updated = steps.update(state, resident, collected.batch, scored)

      if pending is not None:  # one step late: the devices are already at the next one
        writer.write(pending.step, finished(pending))
      lag = ahead.lag(step) if collected.sampled else 0
      pending = InFlight(step, lag, collected, scored._replace(hidden={}), updated)
      del scored  # hidden states, which would lie beside the cache of the next rollout

      end, stopping = step == config.steps, stopped(step)
      look = end or bool(config.evaluation.every and step % config.evaluation.every == 0)
      save = end or stopping or step % config.checkpoint.every == 0
      if look or save:
        values = finished(pending)
        if look:
          last = judge(step, state.params, progress)
          if reached(config, last) and not end:
            end = True
            logging.info('Step %d has the accuracy of evaluation.stop_at: the run ends.', step)
          values |= last | look_inside(state, given, resident, pending.collected.batch)
          clock.restart()  # looking is not training
        writer.write(step, values)
        if end:
          page = show(pair, objective, pending, config.log.samples)
        pending = None
        if save or end:
          run = {**ahead.get_state(), 'records': records, 'metrics': values, 'accuracy': last}
          run['ended'] = end
          saves.save(step, state, run, ahead.rollout)
      saves.check()
      if stopping and not end:
        saves.wait()
        logging.info('Stopped by a signal; step %d is saved, the same command goes on.', step)
        return last
      if end:
        break
    saves.wait()

  # -------------------------------------------------------------------- report
  if jax.process_index() == 0:
    workdirs.write_pages(workdir, console, page, objective.name)
  return last


def compile_steps(config: Config, pair: Pair, objective: Objective, tx: Any, state: Any) -> Steps:
  """`score` and `update` jitted; the new state takes the memory and the shardings of the old."""
  steps = make_steps(
    pair.student.model,
    pair.models,
    objective,
    tx,
    live_vocab=len(pair.tokenizer),
    microbatch=config.microbatch,
    head_tile=config.head_tile,
    banned_ids=pair.banned_ids,
    samples=config.rollout.samples,
    seed=config.seed,
    frozen_vision=config.freeze == 'vision',
  )
  where = jax.tree.map(lambda x: x.sharding, state)
  return steps._replace(
    score=teachers.compiled(steps.score, pair.given),
    update=jax.jit(steps.update, donate_argnums=0, out_shardings=(where, None)),
  )


def make_judge(
  config: Config, pair: Pair, held_out: dataset.HeldOut, mesh: Mesh, workdir: str
) -> Any:
  """(step, params, progress, given) -> accuracies; the teacher's where `given` has one to itself.

  What the student has right on `data.eval` goes to a file of the workdir, so that runs can be
  compared by record.
  """
  sampling = Sampling(
    max_new_tokens=config.rollout.max_new_tokens, temperature=config.evaluation.temperature
  )

  def make(examples: Sequence[Example]) -> evaluation.Judge:
    wanted = min(len(examples) or 1, config.rollout.prompts * config.rollout.samples)
    rows = evaluation.rows_at_once(wanted, mesh)
    return evaluation.Judge(examples, pair, mesh, rows, config.data.prompt_bucket, config.seed)

  judges = {name: make(examples) for name, examples in held_out.items()}
  gather = config.rollout.gather_weights
  one = lambda model: evaluation.make_generate(model, sampling, pair, gather)
  student = one(pair.student.model)

  def look(step, params, progress, given=None):
    values = {}
    for name, judge in judges.items():
      found, judged = judge.accuracy('eval/accuracy', student, params, progress, name)
      values |= found
      if found and not name:
        workdirs.write_judged(workdir, step, [e.record.id for e in judge.examples], judged)
    teachers_of_run = (given or {}).get('teacher', {})
    if values and config.evaluation.teacher and '' in teachers_of_run:
      teacher = teachers_of_run['']  # one that is parked comes onto the devices
      generate = one(pair.models['teacher'][''])
      for name, judge in judges.items():
        values |= judge.accuracy('eval/teacher_accuracy', generate, teacher, progress, name)[0]
    return values

  return look


def reached(config: Config, looked: dict[str, float]) -> bool:
  """Whether the accuracy of a look is what the run was to stop at."""
  return 0 < config.evaluation.stop_at <= looked.get('eval/accuracy', 0.0)


class Clock:
  """Seconds since it was last read."""

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    """Counts from now."""
    self._last = time.monotonic()

  def lap(self) -> float:
    """Seconds since the last lap, and counts from now."""
    last, self._last = self._last, time.monotonic()
    return self._last - last


def look_back(done: InFlight) -> tuple[Batch, Scored, Updated, np.ndarray]:
  """What is known of a batch beside its prompts, and why each row ended, on the host."""
  batch = done.collected.batch._replace(prompts={}, images=None, teacher_rows=None)
  return collate.fetch((batch, done.scored, done.updated, done.collected.rollout.stop_reason))


def rewards_of(pair: Pair, collected: Collected, mesh: Mesh) -> np.ndarray:
  """[B], each judged by a process that holds the row; NaN for completions of the data."""
  rollout, B = collected.rollout, len(collected.examples)
  if not collected.sampled:
    return np.full(B, np.nan)
  own, _, judged = evaluation.own_rewards(
    pair.tokenizer, collected.examples, rollout.tokens, rollout.mask, mesh
  )
  return evaluation.whole(judged, own, B, mesh)


def finish(
  config: Config,
  objective: Objective,
  pair: Pair,
  mesh: Mesh,
  done: InFlight,
  clock: Clock,
  progress: Progress,
  task: TaskID,
) -> dict[str, float]:
  """Fetches the numbers of a batch, stops the run if one is not finite, and shows a line."""
  collected = done.collected
  batch, scored, updated, stop_reason = look_back(done)
  rewards = rewards_of(pair, collected, mesh)
  if not updated.ok:
    bad = [e.record.id for e, fine in zip(collected.examples, updated.row_finite) if not fine]
    raise Stopped(
      f'the loss or its gradient is not finite at step {done.step} (loss {updated.loss}, gradient '
      f'norm {updated.grad_norm}), records: {", ".join(bad) or "none by itself"}; the parameters '
      f'are those of step {done.step - 1}, and nothing was saved after that step'
    )
  values = metrics.of_update(
    batch,
    scored,
    updated,
    objective,
    rewards,
    stop_reason == StopReason.LENGTH.value,
    collected.sampled,
    done.lag,
  )
  seconds = clock.lap()
  tokens = float(batch.mask.sum())
  values |= {'time/step_seconds': seconds, 'time/tokens_per_second': tokens / max(seconds, 1e-9)}
  progress.update(task, completed=done.step, rate=f'{tokens / max(seconds, 1e-9):,.0f}')
  if done.step % config.log.every == 0 or done.step in (1, config.steps):
    progress.console.print(
      metrics.line(done.step, config.steps, values, objective.regimes),
      highlight=False,
      soft_wrap=True,
    )
  return values


def show(pair: Pair, objective: Objective, done: InFlight, count: int) -> list[dict]:
  """The first completions of a batch as records of samples.html."""
  batch, scored, updated, stop_reason = jax.tree.map(
    lambda x: x[:count] if x.ndim else x, look_back(done)
  )
  examples = done.collected.examples[:count]
  texts = evaluation.decode(pair.tokenizer, batch.tokens, batch.mask)
  rewards = evaluation.rewards(examples, texts)
  return token_records.describe(
    pair.tokenizer,
    objective,
    examples,
    batch,
    scored,
    updated.token,
    stop_reason,
    rewards,
    done.step,
  )


def main() -> None:
  """The command."""
  config = cli.config_of(_CONFIG)
  train(config, FLAGS.workdir)


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', 'configs/quickstart.py', 'What to run.')
  flags.DEFINE_string('workdir', 'runs/default', 'Where the run lives; it goes on from there.')
  cli.run(main, several=True)
