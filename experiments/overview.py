"""The figure of the README's first screen, from the results of `signal` and `text`.

  python -m experiments.overview

Left: the mean privilege advantage gap of each kind of token, a dot a student. Right: where students
ended without the hint, by method, a dot a student, mean and 95 % t-interval.
"""

import json

from absl import app
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dopd_jax.report import INK, RULE, SOFT
from experiments import grid, results
from experiments.draw import BLUE, REFERENCE, TEACHER
from experiments.results import estimate

OUT = grid.ROOT / 'docs' / 'overview.png'
KINDS = {
  'execution': 'execution:\na value to compute',
  'untold': 'plan that follows\nfrom the prompt',
  'told': 'plan that only\nthe hint tells',
}
ARMS = {
  'opd': 'vanilla OPD',
  'opd_privileged': 'OPD to the hinted teacher',
  'self_privileged': 'self-distillation with the hint',
  'dopd': 'DOPD',
  'hint_routing': 'routing by what the hint tells',
}


def main(argv):
  """Draws it."""
  del argv
  drawn = Figure(figsize=(10.4, 3.1), layout='constrained')
  left, right = drawn.subplots(1, 2, width_ratios=(1, 1.25))
  folder = grid.ROOT / 'experiments'
  looked = json.loads((folder / 'signal' / 'results.json').read_text())
  gaps = {label: [one['mean']['gap'][kind] for one in looked] for kind, label in KINDS.items()}
  _rows(left, gaps, 'The privilege advantage gap, nats a token')
  experiment = grid.load('text')
  found = results.read(experiment, folder / 'text', 'results')
  by_arm = {s.arm: s for s in results.summarise(experiment, found)}
  finals = {label: list(by_arm[arm].finals.values()) for arm, label in ARMS.items()}
  _rows(right, finals, 'Accuracy without the hint after 150 steps, ten students')
  right.axvline(by_arm['opd'].start, color=SOFT, ls=(0, (2, 1.5)), lw=1)
  teacher = results.final(found[0], 'eval/teacher_accuracy')
  right.axvline(teacher, color=TEACHER, ls='--', lw=1.3)
  for x, word in ((by_arm['opd'].start, 'start'), (teacher, 'teacher')):
    right.annotate(word, (x, 0), (3, 2), ('data', 'axes fraction'), 'offset points', color=SOFT)
  right.xaxis.set_major_formatter(lambda value, _: f'{100 * value:.3g} %')
  drawn.savefig(OUT, dpi=130)


def _rows(axes: Axes, values: dict[str, list[float]], title: str) -> None:
  for row, seeds in enumerate(values.values()):
    mean = estimate(seeds)
    axes.plot(seeds, [row] * len(seeds), 'o', color=REFERENCE, ms=4, alpha=0.75, mew=0)
    axes.errorbar(mean.mean, row, xerr=mean.half, fmt='s', color=BLUE, ms=5.5, lw=1.6)
  axes.set_yticks(range(len(values)), list(values), fontsize=9)
  axes.set_ylim(len(values) - 0.5, -0.5)
  axes.set_title(title, loc='left', fontsize=10.5, fontweight='bold', color=INK)
  axes.tick_params(labelsize=9, colors=SOFT, length=0)
  axes.tick_params(axis='y', labelcolor=INK)
  axes.grid(axis='x', color=RULE, lw=0.7)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(RULE)


if __name__ == '__main__':
  app.run(main)
