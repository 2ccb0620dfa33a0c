"""Draws docs/regimes.svg, the README's picture of DOPD's four regimes:  python docs/regimes.py

Names, rules and colours come from the package, so that the picture cannot drift from the code. The
ground is transparent and the text outside the cells has a grey that both a white and a dark page
leave readable: an SVG in a README cannot know the page's theme.
"""

import re
from pathlib import Path
from xml.sax.saxutils import escape

from dopd_jax.samples import REGIMES

GREY, DARK, LIGHT = '#747c87', '#17191c', '#ffffff'
LEFT, TOP, CELL_WIDTH, CELL_HEIGHT, GAP = 92, 82, 340, 146, 8
RIGHT, BOTTOM = LEFT + 2 * CELL_WIDTH + GAP, TOP + 2 * CELL_HEIGHT + GAP
WIDTH, HEIGHT = RIGHT + LEFT, BOTTOM + 70
CAPTION = (
  'q_S , q_T : probability of the sampled token under Sp and Tp,',
  'the student and the teacher that also see the privileged context',
)
CENTRED = 'text-anchor="middle"'


def text(x: float, y: float, words: str, size: int, colour: str, extra: str = '') -> str:
  """One line of text; q_S and q_T, which something must follow, get a subscript."""
  subscript = r'q<tspan dy="4" font-size="75%">\1</tspan><tspan dy="-4">\2</tspan>'
  words = re.sub(r'q_(\w)(.)', subscript, escape(words))
  return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" {extra}>{words}</text>'


def cell(name: str, column: int, row: int) -> list[str]:
  """One regime: its letters and name, and below them what its tokens are trained on."""
  style = REGIMES[name]
  x, y = LEFT + column * (CELL_WIDTH + GAP), TOP + row * (CELL_HEIGHT + GAP)
  ink = LIGHT if name in ('HT', 'HS') else DARK
  box = f'x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" rx="8"'
  return [
    f'<rect {box} fill="{style.colour}"/>',
    f'<text x="{x + 22}" y="{y + 48}" font-size="31" font-weight="700" fill="{ink}">{name}'
    f'<tspan dx="12" font-size="22" font-weight="400">{escape(style.name)}</tspan></text>',
    text(x + 22, y + 92, style.rule, 19, ink),
    text(x + 22, y + 119, f'weight {style.weight}', 19, ink),
  ]


def side(x: float, angle: int, heading: str, x_heading: float, rows: tuple[str, str]) -> list[str]:
  """What tells a column's upper cell from its lower one, written along its side."""
  middle = TOP + CELL_HEIGHT + GAP / 2
  lines = [(x_heading, middle, heading, 16)]
  lines += [(x, middle + sign * (CELL_HEIGHT + GAP) / 2, r, 18) for sign, r in zip((-1, 1), rows)]
  return [
    text(x, y, words, size, GREY, f'{CENTRED} transform="rotate({angle} {x:g} {y:g})"')
    for x, y, words, size in lines
  ]


def picture() -> str:
  """The SVG, as text."""
  middle = (LEFT + RIGHT) / 2
  column = (CELL_WIDTH + GAP) / 2
  description = '; '.join(
    f'{name}, {style.name}: {style.condition}; {style.rule}, weight {style.weight}'
    for name, style in REGIMES.items()
  )
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    f' height="{HEIGHT}" role="img" aria-labelledby="title description"'
    ' font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, Helvetica, Arial, sans-serif">',
    '<title id="title">DOPD\'s four regimes</title>',
    f'<desc id="description">{escape(description)}</desc>',
    text(middle, 26, 'privilege advantage gap  |log q_T − log q_S|', 16, GREY, CENTRED),
    text(middle - column, 62, 'low: below its threshold', 18, GREY, CENTRED),
    text(middle + column, 62, 'high: at its threshold or above', 18, GREY, CENTRED),
    *cell('LH', 0, 0),
    *cell('LL', 0, 1),
    *cell('HT', 1, 0),
    *cell('HS', 1, 1),
    *side(LEFT - 22, -90, 'confidence  q_S + q_T ', LEFT - 58, ('high', 'low')),
    *side(
      RIGHT + 22,
      90,
      'which of the two is surer',
      RIGHT + 58,
      ('q_T ≥ q_S ', 'q_T < q_S '),
    ),
    text(middle, BOTTOM + 34, CAPTION[0], 16, GREY, CENTRED),
    text(middle, BOTTOM + 57, CAPTION[1], 16, GREY, CENTRED),
    '</svg>',
  ]
  return '\n'.join(parts) + '\n'


if __name__ == '__main__':
  Path(__file__).with_name('regimes.svg').write_text(picture(), 'utf-8', newline='\n')
