"""Writes methods.md, the table of all methods, from their objectives:  python docs/methods.py"""

import inspect
import pathlib

from dopd_jax import objectives

PAGE = pathlib.Path(__file__).parent / 'methods.md'
NEEDS = (  # (what must be there, when)
  ('a teacher', lambda o: 'teacher' in o.weights),
  ('a frozen copy of the student', lambda o: 'frozen' in o.weights),
  ('a running mean of the student', lambda o: 'ema' in o.weights),
  ('hints', lambda o: 'privileged' in o.contexts),
  ('a verifier', lambda o: o.rewards),
  ('completions in the data', lambda o: o.source != 'student'),
  ('boxes', lambda o: o.images & {'crop', 'boxed'}),
  ('a degraded image', lambda o: 'degraded' in o.images),
)


def view(name, v):
  """`Tp` (teacher, privileged)."""
  image = '' if v.image == 'full' else f', {v.image} image'
  return f'`{name}` ({v.weights}, {v.context}{image})'


def row(name, settings):
  """One method with its default settings."""
  o = settings().build()
  title = inspect.getdoc(inspect.getmodule(settings)).splitlines()[0]
  needs = [what for what, when in NEEDS if when(o)]
  if o.least_samples > 1:
    needs.append(f'{o.least_samples} or more completions a prompt')
  cells = (
    f'[`{name}`](../dopd_jax/objectives/{settings.__module__.rpartition(".")[2]}.py)',
    title.rstrip('.'),
    ', '.join(view(n, v) for n, v in o.views.items()) or '-',
    str(len(o.views)),
    'yes' if o.rewards else '-',
    str(o.updates),
    ', '.join(needs) or '-',
  )
  return f'| {" | ".join(cells)} |'


def page():
  """The whole page."""
  head = (
    'method', 'what it is', 'views that are scored', 'extra forwards', 'rewards', 'updates',
    'needs',
  )  # fmt: skip
  lines = (
    '# Methods',
    '',
    'Made by `python docs/methods.py` from the objectives with their default settings. A view is '
    'a policy that is asked about the sampled tokens: whose weights read which prompt. Each costs '
    "one forward pass beside the student's own, which has the gradient; `updates` is how many of "
    'those a rollout batch gets.',
    '',
    f'| {" | ".join(head)} |',
    f'|{"---|" * len(head)}',
    *(row(name, settings) for name, settings in objectives.METHODS.items()),
  )
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  PAGE.write_text(page())
