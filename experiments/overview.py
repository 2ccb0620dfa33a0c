"""The figure of the README's first screen, from the results of `signal` and `text`.

  python -m experiments.overview

Left: to which regime DOPD sends each kind of token, before any distillation. Right: where students
ended without the hint, by method.
"""

import json
import pathlib

import numpy as np
from absl import app
from matplotlib.figure import Figure

from dopd_jax.report import INK, SOFT
from dopd_jax.samples import REGIMES
from experiments import draw, grid, results

OUT = grid.ROOT / 'docs' / 'overview.png'
KINDS = {
  'untold': 'plan: follows from the prompt',
  'told': 'plan: only the hint tells',
  'execution': 'execution: a value',
  'right': 'right tokens',
  'wrong': 'wrong tokens',
}
ARMS = {
  'opd': 'vanilla OPD',
  'opd_privileged': 'OPD, hinted teacher',
  'self_privileged': 'self-distillation',
  'dopd': 'DOPD',
  'hint_routing': 'hint routing',
}


def figure(folder: pathlib.Path) -> Figure:
  """From the results below `experiments/`."""
  drawn = Figure(figsize=(11.5, 3.3), layout='constrained')
  left, right = drawn.subplots(1, 2, width_ratios=(1.05, 1))

  looked = json.loads((folder / 'signal' / 'results.json').read_text())
  begin = np.zeros(len(KINDS))
  for name, about in REGIMES.items():
    share = np.array([np.mean([one['regimes'][k][name] for one in looked]) for k in KINDS])
    left.barh(
      range(len(KINDS)), share, 0.72, left=begin, color=about.colour, label=f'{name} {about.name}'
    )
    for row, (x, width) in enumerate(zip(begin, share)):
      if width > 0.07:
        left.text(
          x + width / 2,
          row,
          f'{100 * width:.0f}',
          ha='center',
          va='center',
          color=INK if name in ('LH', 'LL') else 'white',
        )
    begin += share
  draw.name_rows(left, KINDS.values())
  left.set_xlim(0, 1)
  left.xaxis.set_major_formatter(draw.percent)
  title = dict(loc='left', fontsize=10, fontweight='bold', color=INK)
  left.set_title('Where DOPD sends tokens, before any training', **title)
  left.legend(loc='upper center', bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False, fontsize=9)

  experiment = grid.load('text')
  found = results.read(experiment, folder / 'text', 'results')
  by_arm = {s.arm: s for s in results.summarise(experiment, found)}
  draw.rows(right, {label: list(by_arm[arm].finals.values()) for arm, label in ARMS.items()})
  begun = by_arm['opd'].start
  right.axvline(begun, color=SOFT, ls=(0, (2, 1.5)), lw=1)
  right.annotate(
    'start', (begun, 0), (3, 2), ('data', 'axes fraction'), 'offset points', color=SOFT
  )
  right.xaxis.set_major_formatter(draw.percent)
  right.set_title('Accuracy without the hint, 150 steps later', **title)
  teacher = results.final(found[0], 'eval/teacher_accuracy')
  right.set_xlabel(
    f'dots: students; squares: mean, 95 % interval; teacher: {draw.percent(teacher)}',
    fontsize=8, color=SOFT, loc='left',
  )  # fmt: skip
  return drawn


def main(argv: list[str]) -> None:
  """Draws it."""
  del argv
  figure(grid.ROOT / 'experiments').savefig(OUT, dpi=130)


if __name__ == '__main__':
  app.run(main)
