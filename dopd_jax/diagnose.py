r"""Looks at a pair before a run is paid for: what would DOPD do with each token?

  python -m dopd_jax.diagnose --teacher=DIR --student=DIR --data=FILE.jsonl --out=DIR

Records have `prompt`, `privileged_context` and, where completions are given, `completion` or
`completion_ids`; otherwise the student samples one. Written are tokens.jsonl (a line a record,
arrays over completion tokens, nats), summary.json with both thresholds, and samples.html.
"""

import dataclasses
import json
import os
import sys

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dopd_jax import (
  cli,
  collate,
  dataset,
  evaluation,
  policies,
  samples,
  sharding,
  sight,
  teachers,
  token_records,
)
from dopd_jax import state as states
from dopd_jax.config import Config, Data, Policy, Rollout
from dopd_jax.data import Example, open_source, tokenise
from dopd_jax.errors import UserError
from dopd_jax.objectives import Dopd
from dopd_jax.rollout import Sampling
from dopd_jax.step import make_steps
from dopd_jax.workdirs import writing

FLAGS = flags.FLAGS
FIELDS = (
  'completion_ids',
  'student_logp',
  'privileged_student_logp',
  'privileged_teacher_logp',
  'gap',
  'regime',
  'loss',
)


def diagnose(config: Config, out: str, console: Console, microbatch: int = 8) -> dict:
  """Scores every record of `config.data.train`, thresholds over all of them; returns the summary.

  Raises:
    UserError: as training does for the same pair and data.
  """
  objective = config.objective.build()
  mesh = sharding.make_mesh(1, -1, 1)
  with jax.set_mesh(mesh):
    with console.status('loading the pair'):
      pair = policies.load_pair(config, mesh, {'teacher'})
      examples, config = read_examples(config, pair)
    rows = -(-len(examples) // (microbatch * mesh.size)) * microbatch * mesh.size
    fill = rows - len(examples)
    examples += examples[:1] * fill  # fillers: scored with an empty mask
    with console.status(f'sampling and scoring {rows - fill} records'):
      by_context = collate.put(
        collate.prompts(
          examples,
          sorted(objective.prompts),
          config.data.prompt_bucket,
          pair.pad_id,
          0,
          pair.sight,
        ),
        mesh,
      )
      batch, stop_reason = complete(config, pair, mesh, examples, by_context)
      alive = collate.put(np.arange(rows) < rows - fill, mesh)[:, None]
      batch = batch._replace(mask=batch.mask & alive, supervised=batch.supervised & alive)
      token, scored = score(config, pair, objective, batch, microbatch * mesh.size)
      seen = (batch._replace(prompts={}, images=None), scored, token, stop_reason)
      batch, scored, token, stop_reason = collate.fetch(seen)

  keep = lambda x: x[: rows - fill] if np.ndim(x) else x
  batch, scored, token = jax.tree.map(
    keep, (batch._replace(prompts={}, images=None), scored, token)
  )
  examples = examples[: rows - fill]
  rewards = evaluation.rewards(
    examples, evaluation.decode(pair.tokenizer, batch.tokens, batch.mask)
  )
  records = token_records.describe(
    pair.tokenizer, objective, examples, batch, scored, token, stop_reason, rewards
  )
  summary = summarise(objective.regimes, batch, scored, token)
  write(out, records, summary, f'{config.teacher.path} -> {config.student.path}')
  console.print(table(summary))
  return summary


def read_examples(config: Config, pair: policies.Pair) -> tuple[list[Example], Config]:
  """Examples with their completions, ids exactly as given; and the config with its N."""
  room = min(x.model.config.max_position_embeddings for x in pair.policies.values())
  examples = tokenise(
    open_source(config.data.train, loaders=dataset.LOADERS, image_folder=config.data.image_folder),
    dataset.renderer(config, pair),
    max_prompt_tokens=sys.maxsize,
    max_completion_tokens=sys.maxsize,
    on_too_long='error',
    name=config.data.train,
  ).examples
  examples = [_with_ids(example, len(pair.tokenizer)) for example in examples]
  given = [e.completion_ids is not None for e in examples]
  if any(given) and not all(given):
    raise UserError(
      f'record {examples[given.index(False)].record.id} has no completion and others have: give '
      'all of them one, or none'
    )
  longest = max(max(len(e.prompt_ids), len(e.privileged_ids)) for e in examples)
  if all(given):
    N = max(1, *(len(e.completion_ids or []) for e in examples))
  else:
    N = config.rollout.max_new_tokens or max(1, min(256, room - longest))
  if longest + N > room:
    raise UserError(
      f'the longest prompt has {longest} tokens and the completion up to {N}, over the context of '
      f'{room} tokens: shorten the prompts or lower --max_new_tokens'
    )
  rollout = dataclasses.replace(config.rollout, max_new_tokens=N)
  return examples, dataclasses.replace(config, rollout=rollout)


def _with_ids(example: Example, live: int) -> Example:
  ids = example.record.extra.get('completion_ids')
  if ids is None:
    return example
  if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < live for i in ids):
    raise UserError(
      f'record {example.record.id}: completion_ids must be a list of ids from 0 to {live - 1}'
    )
  return dataclasses.replace(example, completion_ids=ids)


def complete(config: Config, pair: policies.Pair, mesh, examples, by_context):
  """The batch with the given completions, or with sampled ones; and why each row ended."""
  images = collate.put(sight.images(examples, ['full'], pair.sight, mesh), mesh)
  N = config.rollout.max_new_tokens
  if examples[0].completion_ids is not None:
    rollout, _ = collate.fixed_completions(examples, N, pair.pad_id)
    rollout = collate.put(rollout, mesh)
  else:
    sampling = Sampling(max_new_tokens=N, temperature=config.rollout.temperature)
    generate = evaluation.make_generate(pair.student.model, sampling, pair)
    index = collate.put(np.array([e.index for e in examples], np.uint32), mesh)
    key = jax.random.key(config.seed)
    shown = (images or {}).get('full')
    rollout = generate(pair.student.params, by_context['plain'], key, index, shown)
  return collate.as_batch(by_context, rollout)._replace(images=images), rollout.stop_reason


def score(config: Config, pair: policies.Pair, objective, batch, microbatch: int):
  """What `score` and `measure` say, without hidden states."""
  import optax

  tx = optax.identity()
  student = pair.student
  given, _ = teachers.given(pair.given)
  steps = make_steps(
    student.model,
    pair.models,
    objective,
    tx,
    live_vocab=len(pair.tokenizer),
    microbatch=microbatch,
    head_tile=config.head_tile,
    banned_ids=pair.banned_ids,
  )
  state = states.create(student.params, tx, objective)
  scored = jax.jit(steps.score)(state, given, batch)
  token = jax.jit(steps.measure)(state, given, batch, scored)
  return token, scored._replace(hidden={})


def summarise(regimes, batch, scored, token) -> dict:
  """Shares, means and thresholds over all tokens."""
  mask, regime = batch.mask, scored.plan.regime
  n = max(int(mask.sum()), 1)
  by_regime = {}
  for i, name in enumerate(regimes):
    here = regime == i
    count = max(int(here.sum()), 1)
    by_regime[name] = {
      'share': float(here.sum() / n),
      'loss': float(token.loss[here].sum() / count),
      'gap': float(scored.plan.token['gap'][here].sum() / count),
    }
  entropies = {'S': token.entropy, **{k: v.entropy for k, v in scored.signals.items()}}
  return {
    'records': len(mask),
    'tokens': int(mask.sum()),
    **{name: float(value) for name, value in scored.plan.scalars.items()},
    'entropy': {name: float(value[mask].sum() / n) for name, value in entropies.items()},
    'regimes': by_regime,
  }


def write(out: str, records: list[dict], summary: dict, title: str) -> None:
  """tokens.jsonl, summary.json and samples.html."""
  thresholds = {name: summary[name] for name in samples.THRESHOLDS}
  with (  # all three or none
    writing(os.path.join(out, 'tokens.jsonl')) as tokens,
    writing(os.path.join(out, 'summary.json')) as facts,
    writing(os.path.join(out, 'samples.html')) as page,
  ):
    for record in records:
      line = {'record': record['id'], **{name: record[name] for name in FIELDS}}
      tokens.write(json.dumps(line) + '\n')
    json.dump(summary, facts, indent=2)
    samples.write_samples(records[:64], page.name, thresholds=thresholds, title=title)


def table(summary: dict) -> Table:
  """The summary for a terminal."""
  result = Table(title=f'{summary["records"]} records, {summary["tokens"]} tokens')
  for column in ('regime', 'share', 'mean loss (nats)', 'mean gap (nats)'):
    result.add_column(column, justify='left' if column == 'regime' else 'right')
  for name, r in summary['regimes'].items():
    result.add_row(name, f'{r["share"]:.1%}', f'{r["loss"]:.4f}', f'{r["gap"]:.4f}')
  entropy = ', '.join(f'{k} {v:.3f}' for k, v in summary['entropy'].items())
  result.caption = (
    f'gap threshold {summary["gap_threshold"]:.4f} nats, confidence threshold '
    f'{summary["confidence_threshold"]:.4f}; entropy {entropy} nats'
  )
  return result


def main() -> None:
  """The command."""
  config = Config(
    objective=Dopd(k=FLAGS.k, trim=FLAGS.trim, scope=FLAGS.scope),
    student=Policy(path=FLAGS.student),
    teacher=Policy(path=FLAGS.teacher),
    data=Data(train=FLAGS.data, image_folder=FLAGS.image_folder),
    rollout=Rollout(max_new_tokens=FLAGS.max_new_tokens, temperature=FLAGS.temperature),
    seed=FLAGS.seed,
  )
  diagnose(config, FLAGS.out, Console(), FLAGS.microbatch)


if __name__ == '__main__':
  flags.DEFINE_string('teacher', None, 'Hugging Face directory or hub name.')
  flags.DEFINE_string('student', None, 'Hugging Face directory or hub name.')
  flags.DEFINE_string('data', None, 'Records with prompt and privileged_context.')
  flags.DEFINE_string('image_folder', '', 'Where images may lie besides the folder of the data.')
  flags.DEFINE_string('out', None, 'Directory to write into.')
  flags.DEFINE_integer('max_new_tokens', 0, 'Longest sampled completion; 0: up to 256 tokens.')
  flags.DEFINE_float('temperature', 1.0, 'Of sampled completions; 0 is greedy.')
  flags.DEFINE_integer('k', 128, 'Tokens in the top-K losses.')
  flags.DEFINE_float('trim', 0.05, 'Share of the largest values that a threshold leaves out.')
  flags.DEFINE_string('scope', 'batch', 'Thresholds over the batch, or over each sequence.')
  flags.DEFINE_integer('microbatch', 8, 'Records a forward pass and device.', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Of sampled completions.')
  flags.mark_flags_as_required(['teacher', 'student', 'data', 'out'])
  cli.run(main)
