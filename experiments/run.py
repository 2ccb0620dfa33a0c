r"""Runs a comparison and writes its results, table and figure.

  python -m experiments.run NAME --jobs=2
  python -m experiments.run NAME --arms=opd,dopd --seeds=0,1
  python -m experiments.run all --quick --jobs=2      # a few steps an arm: do all still run?
  python -m experiments.run NAME --report_only

`experiments/NAME/experiment.py` says what is compared; NAME may also be the path of a folder, or
`all`: those with contrasts named beforehand come first.
Models that it starts from are made first, where they are missing. Then every arm is trained at
every learning rate on the tuning seeds, and the rate with the best mean final metric is taken; then
every arm is trained on every seed. A run writes one JSON file when it has ended, under `results/`
or `tuning/`, its own or those of the experiment that it shares arms with (`pool`); `table.md`,
`curves.png` and `finals.png` are made from these files alone. A command that was cut off goes on
when it is given again: runs with a file are skipped, the others go on from their last checkpoint.

A quick run trains each config once, under the name of the first arm that has it, into `OUT/.quick`,
and shows all tables at the end.

Give one command a pool at a time: two would train the same run in the same workdir. After a change
of code that no config shows, delete the files (of a quick run its whole OUT) and the workdirs to
run anew.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console

from dopd_jax import cli, workdirs
from dopd_jax import config as configs
from dopd_jax.errors import UserError
from experiments import common, draw, grid, models, results, tables, workers
from experiments.grid import Experiment, Run

FLAGS = flags.FLAGS


def walk(
  experiment: Experiment,
  arms: Sequence[str],
  out: pathlib.Path,
  execute: workers.Execute,
  console: Console,
  quick: bool = False,
) -> None:
  """Tunes, then runs, the arms; what has a result is skipped.

  Raises:
    UserError: a config is wrong, or a result is that of another config or of other models; nothing
      has run then.
  """
  tuning = [] if quick else grid.tuning_runs(experiment, arms)
  planned = grid.final_runs(experiment, dict.fromkeys(arms), quick)  # their rates come later
  results.same_models([*tuning, *planned], out)
  with common.bar(console) as bar:
    task = bar.add_task('', total=len(tuning) + len(planned))

    def go(phase: str, runs: Sequence[Run]) -> None:
      todo = [run for run in runs if not results.done(run, out)]
      total = (bar.tasks[task].total or 0) - (len(runs) - len(todo))
      bar.update(task, description=phase, total=total)
      for run, result in execute(todo):
        bar.advance(task)
        line = f'{run.name}: {tables.in_words(experiment, result)}, {result["wall_seconds"]:.0f} s'
        bar.console.print(line, highlight=False, soft_wrap=True)

    if tuning:
      go('tuning', tuning)
      planned = grid.final_runs(experiment, results.rates(experiment, tuning, out))
    go('runs', planned)


def once(
  planned: Mapping[str, Sequence[Run]],
  execute: workers.Execute,
  out: pathlib.Path,
  console: Console,
) -> workers.Into:
  """Trains each config once, all experiments in one go: many arms differ in what a quick run omits.

  Args:
    planned: experiment -> its runs that have no result yet.
    execute: trains runs with their results below `out`.
    out: one folder for all.
    console: where a bar is shown.

  Returns:
    What then takes for training, and gives each run its config's result.
  """
  distinct: dict[str, Run] = {}
  for name, runs in planned.items():
    for run in runs:
      distinct.setdefault(run.config_hash, dataclasses.replace(run, arm=f'{name}.{run.arm}'))
  todo = [run for run in distinct.values() if not results.done(run, out)]
  with common.bar(console) as bar:
    task = bar.add_task('quick runs', total=len(todo))
    for _ in execute(todo):
      bar.advance(task)

  def into(kept: pathlib.Path, _: pathlib.Path) -> workers.Execute:
    def take(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
      for run in runs:
        result = results.of(distinct[run.config_hash], out) | {'arm': run.arm, 'seed': run.seed}
        workers.write(result, run.file(kept))
        yield run, result

    return take

  return into


def write(
  experiment: Experiment, name: str, kept: pathlib.Path, out: pathlib.Path, console: Console
) -> None:
  """`table.md` and figures from the result files; raises `UserError` if there are none.

  Args:
    experiment: what was compared.
    name: of its folder.
    kept: where the results lie.
    out: where the pages go.
    console: where the tables are shown.
  """
  final, tuning = (results.read(experiment, kept, kind) for kind in ('results', 'tuning'))
  if not final and not tuning:
    raise UserError(f'there are no results in {kept}: run the experiment first, or name its --out')
  made = tables.tables(experiment, final, tuning)
  for table in made:
    console.print(table.rich(console.width), '')
  with workdirs.writing(str(out / 'table.md')) as file:
    file.write(tables.page(experiment, name, made, final))
  title = pathlib.Path(name).name
  for metric in (experiment.metric, *experiment.also):
    one = dataclasses.replace(experiment, metric=metric)
    end = '' if metric == experiment.metric else f'_{metric.partition("/")[2].replace("/", "_")}'
    draw.figure(one, final, title).savefig(out / f'curves{end}.png', dpi=130)
    draw.finals(one, final, title).savefig(out / f'finals{end}.png', dpi=130)
  console.print(f'Wrote {out / "table.md"}, curves and finals as .png', soft_wrap=True)


def chosen(flag: str, wanted: Sequence[str], known: Mapping[str, Sequence]) -> dict[str, list]:
  """What a flag leaves of each experiment; all where it is not given.

  Args:
    flag: its name.
    wanted: its value.
    known: experiment -> the arms or seeds that it has.

  Raises:
    UserError: no experiment has one of them.
  """
  there = {str(x) for each in known.values() for x in each}
  for one in wanted:
    if one not in there:
      raise UserError(configs.unknown(f'{flag[:-1]} in --{flag}', one, there))
  return {name: [x for x in each if not wanted or str(x) in wanted] for name, each in known.items()}


def folders(
  name: str, experiment: Experiment, elsewhere: str, quick: bool
) -> tuple[pathlib.Path, pathlib.Path]:
  """Where an experiment's pages go, and its results.

  Those of a quick run are not shared: without tuning, an arm has another rate in an experiment that
  names the tuned one.
  """
  leaf = pathlib.Path(name).name
  out = pathlib.Path(elsewhere, leaf) if elsewhere else pathlib.Path('experiments', name)
  return out, out if quick else out.with_name(experiment.pool or leaf)


def main() -> None:
  """The command."""
  if not _NAME:
    raise UserError('name an experiment first: python -m experiments.run NAME --flag=value')
  experiments = {name: grid.load(name) for name in (grid.names() if _NAME == 'all' else [_NAME])}
  if FLAGS.report_only and FLAGS.quick and not FLAGS.out:
    raise UserError('a quick run is reported from its folder: name it by --out')
  arms = chosen('arms', FLAGS.arms, {name: list(e.arms) for name, e in experiments.items()})
  seeds = chosen('seeds', FLAGS.seeds, {name: e.seeds for name, e in experiments.items()})
  going = {
    name: dataclasses.replace(each, seeds=seeds[name])
    for name, each in experiments.items()
    if arms[name] and seeds[name]
  }
  elsewhere = FLAGS.out or (tempfile.mkdtemp(prefix='quick-') if FLAGS.quick else '')
  runs = pathlib.Path(FLAGS.runs or (f'{elsewhere}/runs' if elsewhere else 'runs/experiments'))
  places = {n: folders(n, each, elsewhere, FLAGS.quick) for n, each in going.items()}
  console = Console()
  if not FLAGS.report_only:
    common.end_by_interrupt()
  try:
    # The commit is that of the code before a table is written.
    with workers.Processes(FLAGS.jobs, common.commit()) as processes:
      into = processes.into
      if FLAGS.quick and not FLAGS.report_only:
        for variable, value in common.fast_compilation().items():
          os.environ.setdefault(variable, value)
        quick = pathlib.Path(elsewhere, '.quick')
        planned = {
          places[name][0].name: [
            run
            for run in grid.final_runs(each, dict.fromkeys(arms[name]), quick=True)
            if not results.done(run, places[name][1])
          ]
          for name, each in going.items()
        }
        into = once(planned, into(quick, runs), quick, console)
      for name, fewer in going.items():
        out, kept = places[name]
        if not FLAGS.report_only:
          if not FLAGS.quick:
            models.prepare(fewer, into, console)
          walk(fewer, arms[name], kept, into(kept, runs / kept.name), console, FLAGS.quick)
        there = {result['arm'] for result in results.read(experiments[name], kept, 'results')}
        if _NAME != 'all' or there.issuperset(arms[name]):
          write(experiments[name], name, kept, out, console)
  except KeyboardInterrupt:
    same = f', with --out={elsewhere},' if elsewhere else ''
    console.print(f'Stopped; the same command{same} goes on from here.', soft_wrap=True)
    raise


if __name__ == '__main__':
  # The experiment's name is no flag: it is taken off before the flags are read.
  _NAME = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith('-') else ''
  flags.DEFINE_integer('jobs', 1, 'Processes; more than one for CPU only.', lower_bound=1)
  flags.DEFINE_list('arms', [], 'The arms to run; all if empty. Others keep their results.')
  flags.DEFINE_list('seeds', [], 'The seeds to run, of those declared; all if empty.')
  flags.DEFINE_string('out', '', 'Folder below which all but models goes; experiments if empty.')
  flags.DEFINE_string('runs', '', 'Workdirs; OUT/runs with --out, else runs/experiments.')
  flags.DEFINE_bool(
    'quick', False, 'A few steps an arm, one seed, no tuning; a new folder as --out.'
  )
  flags.DEFINE_bool('report_only', False, 'Makes table.md and the figures from the result files.')
  cli.run(main)
