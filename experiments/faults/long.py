r"""A long run of the quickstart: does its memory grow, do its steps slow down, does it recompile?

  python -m experiments.faults.long            # 2,000 steps: three minutes on two calm CPU cores

While `python -m dopd_jax.train` runs with the settings of `configs/quickstart.py` (more steps, a
save every 100, a look every 500), the resident memory of its process is read twice a second. Then
lines are fitted over steps from `FROM` on: by least squares to the memory, and by the median of
pairwise slopes (Theil-Sen), which a busy machine cannot bend, to the seconds a step. Compiled
programs are counted after the first look, which brings its own. `results/long.json` and `long.png`
are written beside `table.md`.
"""

import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from dopd_jax import cli, metrics, report, workdirs
from dopd_jax.report import INK, RULE, SOFT
from dopd_jax.samples import REGIMES
from experiments import common
from experiments.faults import lab as labs

FLAGS = flags.FLAGS
HERE = pathlib.Path(__file__).parent
FROM = 0.1  # of the steps: compilations and first saves are behind
LOOK = 500  # steps between looks
FLAT = 0.02  # of the median, over the whole run: less is no growth


def resident(pid: int) -> float:
  """MiB of resident memory of a process; Linux."""
  lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) / 1024


def watch(root: pathlib.Path, steps: int, console: Console) -> dict[str, Any]:
  """Runs, and returns what was read on the way."""
  workdir, cache = root / 'run', root / 'xla'
  words = [
    f'--config={labs.ROOT}/configs/quickstart.py',
    f'--workdir={workdir}',
    f'--config.steps={steps}',
    '--config.checkpoint.every=100',
    f'--config.evaluation.every={LOOK}',
  ]
  process = labs.Process([*labs.TRAIN, *words], root)
  read, compiled = [], {}
  rows = labs.Tail(workdir / 'metrics.jsonl')
  with metrics.bar(console, unit='') as bar:
    task = bar.add_task('quickstart', total=steps, rate='')
    while process.running():
      time.sleep(0.5)
      step = rows.last_step()
      if step > 0 and process.running():
        read.append((step, resident(process.pid)))
        compiled.setdefault(step, sum(1 for _ in cache.glob('*')))
      bar.update(task, completed=max(step, 0))
  ended = process.end()
  if ended.code:
    raise RuntimeError(f'the run ended with {ended.code}: {ended.sentence}')
  found = report.read_metrics(workdir / 'metrics.jsonl')
  seconds = [(r['step'], r['time/step_seconds']) for r in found if 'time/step_seconds' in r]
  return {
    'memory_mib': read,
    'step_seconds': seconds,
    'compiled_programs': sorted(compiled.items()),
  }


def judge(seen: dict[str, Any], steps: int) -> dict[str, Any]:
  """Slopes with their 95 % intervals, as growth over the whole run, and whether they are flat."""
  start = FROM * steps
  x, y = _from(seen['memory_mib'], start)
  fitted = stats.linregress(x, y)
  half = stats.t.ppf(0.975, len(x) - 2) * fitted.stderr
  memory = _growth(np.array([fitted.slope, fitted.slope - half, fitted.slope + half]), y, steps)
  x, y = _from(seen['step_seconds'], start)
  x, y = x[:: max(len(x) // 1000, 1)], y[:: max(len(y) // 1000, 1)]
  slope, _, low, high = stats.theilslopes(y, x)
  seconds = _growth(np.array([slope, low, high]), y, steps)
  programs = [count for step, count in seen['compiled_programs'] if step > LOOK]
  return {
    'memory_mib': memory,
    'step_seconds': seconds,
    'compiled_programs': {'from': programs[0], 'to': programs[-1], 'flat': len(set(programs)) == 1},
  }


def _from(pairs: Any, start: float) -> tuple[np.ndarray, np.ndarray]:
  x, y = np.array(pairs, np.float64).T
  return x[x >= start], y[x >= start]


def _growth(slopes: np.ndarray, values: np.ndarray, steps: int) -> dict[str, Any]:
  median = float(np.median(values))
  growth, low, high = (float(s) * steps * (1 - FROM) / median for s in slopes)
  return {
    'median': median,
    'growth_over_the_run': growth,
    'low': low,
    'high': high,
    'flat': low <= 0 <= high or growth < FLAT,
  }


def draw(seen: dict[str, Any], steps: int, judged: dict[str, Any]) -> Figure:
  """Memory and seconds by step, with the growth in words."""
  drawn = Figure(figsize=(9, 3.2))
  drawn.set_layout_engine('constrained')
  names = {'memory_mib': 'Resident memory (MiB)', 'step_seconds': 'Seconds a step'}
  for place, (name, title) in enumerate(names.items(), 1):
    axes = drawn.add_subplot(1, 2, place)
    x, y = np.array(seen[name], np.float64).T
    axes.plot(x, y, color=REGIMES['HS'].colour, lw=0.8)
    axes.set_title(title, loc='left', fontsize=10.5, color=INK, pad=18)
    j = judged[name]
    words = f'{100 * j["growth_over_the_run"]:+.2f} % over steps {FROM * steps:.0f} to {steps}'
    words += f' ({100 * j["low"]:+.2f} to {100 * j["high"]:+.2f})'
    axes.annotate(words, (0, 1), (0, 5), 'axes fraction', 'offset points', fontsize=8, color=SOFT)
    axes.set_ylim(0, 1.15 * np.quantile(y, 0.995))
    axes.set_xlabel('step', fontsize=8.5, color=SOFT)
    axes.tick_params(labelsize=8, colors=SOFT, length=0)
    axes.grid(axis='y', color=RULE, lw=0.7)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.spines['bottom'].set_color(RULE)
  return drawn


def main() -> None:
  """The command."""
  out, console = pathlib.Path(FLAGS.out or HERE), Console()
  with tempfile.TemporaryDirectory(prefix='dopd_jax_long_') as root:
    seen = watch(pathlib.Path(root), FLAGS.steps, console)
  judged = judge(seen, FLAGS.steps)
  thin = {k: v[:: max(len(v) // 400, 1)] for k, v in seen.items()}
  result = {
    'steps': FLAGS.steps,
    'judged': judged,
    'commit': common.commit(),
    'versions': workdirs.versions(),
    'device': jax.devices()[0].device_kind,
    'seen': thin,
  }
  with workdirs.writing(str(out / 'results' / 'long.json')) as file:
    file.write(json.dumps(result) + '\n')
  draw(seen, FLAGS.steps, judged).savefig(out / 'long.png', dpi=130)
  for name, found in judged.items():
    console.print(f'{name}: {"flat" if found["flat"] else "NOT FLAT"} {found}', highlight=False)


if __name__ == '__main__':
  flags.DEFINE_integer('steps', 2000, 'Of the run.', lower_bound=2 * LOOK)
  flags.DEFINE_string('out', '', 'Where results/long.json and long.png go; experiments/faults.')
  cli.run(main)
