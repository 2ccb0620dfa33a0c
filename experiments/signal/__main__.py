r"""Does a large gap mean capability? Signals against what each token is by construction.

  python -m experiments.signal                  # the ten students of the text study; a few minutes
  python -m experiments.signal --of=reasoning   # the three of the chains of sums
  python -m experiments.signal --report_only    # table.md and signals.png from results.json

Each student, before any distillation, answers problems at temperature 1; all four policies score
its tokens. What a token is by construction, `kinds.py` says. DOPD's regimes are those of all
problems as one batch.

For `text`, a router is learned from three signals on the two students of the tuning and on training
problems, told tokens against all others, by logistic regression: `router.json`, for `hint_routing`
with `signal='learned'`. What is told of the other students is told on test problems.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from rich.console import Console
from scipy import optimize, special, stats

from dopd_jax import cli, collate, diagnose, evaluation, policies, sharding, workdirs
from dopd_jax.config import Config
from dopd_jax.errors import UserError
from dopd_jax.losses import routing, rules
from dopd_jax.losses.routing import Regime
from dopd_jax.objectives import Compare, Objective, View, hint_routing
from dopd_jax.objectives.grammar import Routed, Seen, all_tokens
from dopd_jax.report import INK, SOFT
from experiments import common, draw, grid, models, workers
from experiments.results import Estimate, estimate
from experiments.signal import kinds

FLAGS = flags.FLAGS
HERE = pathlib.Path(__file__).parent
MICROBATCH = 100
GAP, SIGNED = 'gap', 'signed gap'  # |log Tp(y) - log Sp(y)|, and without the bars
REGIME = 'regime'  # DOPD's, at its defaults
REGIMES = [regime for regime in Regime if regime is not Regime.MASKED]
LOGPS = {view: f'log {view}(y)' for view in hint_routing.VIEWS}
PAIRS = {
  'JS(Tp, Sp)': Compare('Sp', 'Tp', 'js'),
  'JS(Sp, S)': Compare('S', 'Sp', 'js'),
  'JS(Tp, T)': Compare('T', 'Tp', 'js'),
}
LEARNED = 'learned'
SIGNALS = (GAP, SIGNED, *PAIRS, LEARNED)
FEATURES = ('JS(Sp, S)', 'JS(Tp, T)', GAP)  # in the order of `HintRouting.coefficients`
# Name -> tokens that should have the larger signal, tokens that should have the smaller one.
QUESTIONS = {
  'execution over plan': ('execution', 'plan'),
  'execution over told': ('execution', 'told'),
  'told over other first': ('told', 'first'),
  'told over all others': ('told', 'others'),
  'wrong over right plan': ('wrong plan', 'right plan'),
  'wrong over right execution': ('wrong execution', 'right execution'),
}
SHOWN = (
  *('execution', 'untold', 'told', 'right', 'wrong'),
  *('right plan', 'wrong plan', 'right execution', 'wrong execution'),
)  # kinds whose regimes and log-probs are told


class Subject(NamedTuple):
  """What an experiment's students are asked, and where the answer lies."""

  kinds: Callable[..., dict[str, np.ndarray]]
  questions: Sequence[str]
  arm: str  # whose config reads the hint
  folder: pathlib.Path
  router: bool  # whether one is learned, on the students of the tuning


SUBJECTS = {
  'text': Subject(kinds.kinds, tuple(QUESTIONS), 'hint_routing', HERE, router=True),
  'reasoning': Subject(
    kinds.chains,
    ('execution over plan', 'wrong over right plan', 'wrong over right execution'),
    'dopd_chains',
    HERE.parent / 'reasoning' / 'signal',
    router=False,
  ),
}


def everything() -> Objective:
  """An objective that only looks: all views, all pairs, one rule."""

  def router(seen: Seen) -> Routed:
    logps = [seen.signals[view].logp_y for view in ('Sp', 'Tp')]
    signed = logps[1] - logps[0]
    found = {SIGNED: signed, GAP: abs(signed), REGIME: routing.route(*logps, seen.mask).regime}
    found |= {name: seen.signals[view].logp_y for view, name in LOGPS.items()}
    return Routed(all_tokens(seen.mask), {}, {**seen.pairs, **found})

  return Objective(
    name='everything',
    student=View('student'),
    views=hint_routing.VIEWS,
    regimes=('all',),
    rules=((rules.Rule('Tp', 'js'),),),
    router=router,
    pairs=PAIRS,
  )


class Looked(NamedTuple):
  """What is known of a student's answers: [B] bool, [B, N] bool a kind, [B, N] float a signal."""

  seed: int
  right: np.ndarray
  kind: dict[str, np.ndarray]
  signal: dict[str, np.ndarray]


def look(config: Config, kinds_of: Callable[..., dict[str, np.ndarray]] = kinds.kinds) -> Looked:
  """A student answers, and all policies score its tokens.

  Args:
    config: of a run; its student answers `data.eval`. Microbatch rows divide these records.
    kinds_of: as `kinds.kinds`.

  Raises:
    UserError: there are no tokens of some kind.
  """
  objective = everything()
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, train=config.data.eval)
  )
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])  # tiny models
  with jax.set_mesh(mesh):
    pair = policies.load_pair(config, mesh, {'teacher'})
    examples, _ = diagnose.read_examples(config, pair)
    # Its own answers, not those of the records.
    examples = [dataclasses.replace(example, completion_ids=None) for example in examples]
    shown = collate.prompts(
      examples, sorted(objective.prompts), config.data.prompt_bucket, pair.pad_id, 0, pair.sight
    )
    batch, _ = diagnose.complete(config, pair, mesh, examples, collate.put(shown, mesh))
    _, scored = diagnose.score(config, pair, objective, batch, config.microbatch)
    mask, tokens, found = collate.fetch((batch.mask, batch.tokens, scored.plan.token))
  right = evaluation.rewards(examples, evaluation.decode(pair.tokenizer, tokens, mask)) >= 0.5
  kind = kinds_of(examples, pair.tokenizer, tokens, mask)
  if few := [name for name, here in kind.items() if not here.any()]:
    raise UserError(f'there are no tokens of kind {few[0]}: give more --records')
  return Looked(config.seed, right, kind, found)


def fit(students: Sequence[Looked]) -> list[float]:
  """c0 to c3 of the logistic regression of `told` against other tokens, on `FEATURES`.

  The mean log loss over tokens, and 1e-4 of the squared weights, are least.
  """
  rows, told = [], []
  for one in students:
    here = one.kind['plan'] | one.kind['execution']
    rows.append(np.stack([one.signal[name][here] for name in FEATURES], axis=1))
    told.append(one.kind['told'][here])
  x, y = np.concatenate(rows), np.concatenate(told)
  x = np.concatenate([np.ones((len(x), 1)), x], axis=1)

  def loss(c):
    logit = x @ c
    error = special.expit(logit) - y
    value = np.mean(np.logaddexp(0.0, logit) - y * logit) + 1e-4 * np.sum(c[1:] ** 2)
    return value, x.T @ error / len(y) + 2e-4 * np.array([0.0, *c[1:]])

  return optimize.minimize(loss, np.zeros(1 + len(FEATURES)), jac=True).x.tolist()


def measure(
  student: Looked, coefficients: Sequence[float] = (), questions: Sequence[str] = tuple(QUESTIONS)
) -> dict[str, Any]:
  """AUROC of every signal for every question, of one student; and means by kind of token.

  Args:
    student: as `look` found it.
    coefficients: of the learned router; without them it is none of the signals.
    questions: of `QUESTIONS`.
  """
  kind, c, found = student.kind, coefficients, dict(student.signal)
  if c:
    found[LEARNED] = c[0] + sum(w * found[name] for w, name in zip(c[1:], FEATURES))
  signals = [name for name in SIGNALS if name in found]
  asked = {question: QUESTIONS[question] for question in questions}
  return {
    'seed': student.seed,
    'accuracy': float(student.right.mean()),
    'tokens': {name: int(here.sum()) for name, here in kind.items()},
    'auroc': {
      question: {name: auroc(found[name][kind[high]], found[name][kind[low]]) for name in signals}
      for question, (high, low) in asked.items()
    },
    'mean': {
      name: {k: float(found[name][here].mean()) for k, here in kind.items()}
      for name in (*signals, *LOGPS.values())
    },
    'regimes': {
      k: {r.name: float((found[REGIME][kind[k]] == r).mean()) for r in REGIMES}
      for k in SHOWN
      if k in kind
    },
  }


def auroc(high: np.ndarray, low: np.ndarray) -> float:
  """The probability that one of `high` is larger than one of `low`, ties counting half."""
  return float(stats.mannwhitneyu(high, low).statistic / (len(high) * len(low)))


def summary(found: list[dict[str, Any]]) -> dict[str, dict[str, Estimate]]:
  """Question -> signal -> mean over students with its 95 % t-interval."""
  return {
    question: {name: estimate([f['auroc'][question][name] for f in found]) for name in signals}
    for question, signals in found[0]['auroc'].items()
  }


def page(found: list[dict[str, Any]]) -> str:
  """table.md."""
  lines = [
    f'AUROC over {len(found)} students, mean and 95 % t-interval; .5 is chance.',
    '',
    f'| signal | {" | ".join(found[0]["auroc"])} |',
    f'|---|{"---:|" * len(found[0]["auroc"])}',
  ]
  by_question = summary(found)
  for name in next(iter(by_question.values())):
    cells = [by_signal[name] for by_signal in by_question.values()]
    text = ' | '.join(f'{c.mean:.3f} ± {c.half:.3f}' for c in cells)
    lines.append(f'| `{name}` | {text} |')
  lines += [
    '',
    'Where DOPD sends them, share of the tokens of each kind, and their mean log-probs in nats; '
    'means over the students, before any distillation.',
    '',
    f'| tokens | {" | ".join([*(r.name for r in REGIMES), *LOGPS.values()])} |',
    f'|---|{"---:|" * (len(REGIMES) + len(LOGPS))}',
  ]
  for kind in found[0]['regimes']:
    shares = [np.mean([f['regimes'][kind][r.name] for f in found]) for r in REGIMES]
    logps = [np.mean([f['mean'][name][kind] for f in found]) for name in LOGPS.values()]
    row = [f'{x:.3f}' for x in shares] + [f'{x:.2f}' for x in logps]
    lines.append(f'| {kind} | {" | ".join(row)} |')
  return '\n'.join(lines) + '\n'


def picture(found: list[dict[str, Any]]) -> Figure:
  """A panel a question, a row a signal, a dot a student."""
  asked = found[0]['auroc']
  rows = -(-len(asked) // 3)
  drawn = Figure(figsize=(9, 2.5 * rows), layout='constrained')
  panels = drawn.subplots(rows, 3, sharex=True, sharey=True)
  for axes, (question, signals) in zip(panels.flat, asked.items()):
    draw.rows(axes, {name: [f['auroc'][question][name] for f in found] for name in signals})
    axes.axvline(0.5, color=INK, lw=0.8, ls=':')
    axes.set(xlim=(-0.02, 1.02))
    axes.set_title(question, fontsize=10, loc='left', color=INK)
    axes.set_xlabel('AUROC', fontsize=8.5, color=SOFT)
  return drawn


def main() -> None:
  """The command."""
  console, subject = Console(), SUBJECTS[FLAGS.of]
  file, experiment = subject.folder / 'results.json', grid.load(FLAGS.of)
  if not FLAGS.report_only:
    common.end_by_interrupt()
    with workers.Processes(FLAGS.jobs, common.commit()) as processes:
      models.prepare(experiment, processes.into, console)
    looked = {}
    with common.bar(console) as bar:
      seeds = [*(experiment.tuning_seeds if subject.router else ()), *experiment.seeds]
      for seed in bar.track(seeds, description='students'):
        tuning = seed in experiment.tuning_seeds
        config = grid.make_config(experiment, subject.arm, seed, tuning=tuning)
        shown = re.sub(r'\bsize=\d+', f'size={FLAGS.records}', config.data.eval)
        data = dataclasses.replace(config.data, eval=shown)
        config = dataclasses.replace(config, data=data, microbatch=MICROBATCH)
        looked[seed] = look(config, subject.kinds)
    tuned = [looked[seed] for seed in experiment.tuning_seeds if subject.router]
    coefficients = fit(tuned) if subject.router else []
    found = [measure(looked[seed], coefficients, subject.questions) for seed in experiment.seeds]
    subject.folder.mkdir(exist_ok=True)
    with workdirs.writing(str(file)) as out:
      lines = [json.dumps(workers.rounded(one)) for one in found]
      out.write('[\n' + ',\n'.join(lines) + '\n]\n')
    if coefficients:
      with workdirs.writing(str(subject.folder / 'router.json')) as out:
        about = {'features': FEATURES, 'seeds': experiment.tuning_seeds}
        out.write(json.dumps({'coefficients': coefficients, **about}) + '\n')
  if not file.exists():
    raise UserError('there is no results.json yet: run without --report_only first')
  found = json.loads(file.read_text())
  (subject.folder / 'table.md').write_text(page(found))
  picture(found).savefig(subject.folder / 'signals.png', dpi=130)
  console.print(page(found))


if __name__ == '__main__':
  flags.DEFINE_enum('of', 'text', list(SUBJECTS), 'The experiment whose students are looked at.')
  flags.DEFINE_integer('records', 500, f'Problems a student, a multiple of {MICROBATCH}.')
  flags.register_validator('records', lambda n: n > 0 and n % MICROBATCH == 0)
  flags.DEFINE_integer('jobs', 2, 'Models made at a time, where they are missing.', lower_bound=1)
  flags.DEFINE_bool('report_only', False, 'The table and the figure from results.json.')
  cli.run(main)
