"""The samples page: completions with every token coloured by the regime that it was routed to.

`write_samples` renders `assets/samples.html` (Jinja2, everything escaped) with its style and script
inlined. The page makes no request: it opens from a file, and its content security policy forbids
every load and every script but its own, so that text of a completion stays text.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

ASSETS = Path(__file__).parent / 'assets'


class RegimeStyle(NamedTuple):
  """How a regime of DOPD is named, explained and coloured, on the page and in every picture."""

  name: str
  condition: str
  rule: str  # the published one; a run's config may choose another
  weight: str
  colour: str
  tint: tuple[int, int]  # per cent of the colour behind a token, on a light and on a dark page


# Yellow, grey, green and blue as in the paper, in shades of different lightness, so that they stay
# apart for colour-blind eyes (tests/test_samples.py holds the distances).
REGIMES: dict[str, RegimeStyle] = {
  'LH': RegimeStyle(
    'light teacher',
    'low gap, high confidence',
    'top-K reverse KL to Tp',
    '0.6',
    '#f5d547',
    (50, 40),
  ),
  'LL': RegimeStyle(
    'weak self', 'low gap, low confidence', 'top-K reverse KL to Sp', '0.3', '#c2c2c2', (50, 22)
  ),
  'HT': RegimeStyle(
    'strong teacher', 'high gap, q_T ≥ q_S', 'full-vocabulary JS to Tp', '1', '#00875a', (55, 70)
  ),
  'HS': RegimeStyle(
    'light self', 'high gap, q_T < q_S', 'top-K reverse KL to Sp', '0.6', '#3563c9', (45, 55)
  ),
}
# Regimes of other objectives take these in order of appearance.
OTHER_COLOURS = ('#b565a7', '#d1662c', '#1797a6', '#7d5a3c')
UNROUTED = 'unrouted'

# The per-token numbers of a record that the page shows, all in nats.
TOKEN_FIELDS = ('student_logp', 'privileged_student_logp', 'privileged_teacher_logp', 'gap', 'loss')
THRESHOLDS = ('gap_threshold', 'confidence_threshold')
CONTROL = {c: 0x2400 + c for c in range(32) if chr(c) not in '\t\n'} | {127: 0x2421}
STOP_REASONS = {0: 'stop', 1: 'length'}  # rollout.StopReason, by value


def write_samples(
  records: Sequence[Mapping[str, Any]],
  path: str | Path,
  *,
  thresholds: Mapping[str, Any] | None = None,
  title: str = 'Samples',
) -> Path:
  """Writes one self-contained page of sampled completions; returns its path.

  A record is `{id, step?, prompt, privileged_context?, tokens, student_logp?,
  privileged_student_logp?, privileged_teacher_logp?, gap?, regime?, loss?, stop_reason?, reward?,
  gap_threshold?, confidence_threshold?}`. `tokens` are the decoded pieces of the completion; the
  `_logp` fields (of the sampled token), `gap` and `loss` hold one number a token, in nats, and
  `regime` one name a token. Whatever is absent or None is left out of the page. A number that is
  not finite is shown as such. `reward` in [0, 1]: 1 is right, 0 is wrong. `pictures` is a list of
  `{src, width, height, boxes?, labels?}`: a data URI of an image, its size in pixels, and boxes
  [x1, y1, x2, y2] in pixels to draw on it.

  Args:
    records: one mapping a completion, shown in the order given; may be empty.
    path: the file to write, overwritten if it exists.
    thresholds: `gap_threshold` (nats) and `confidence_threshold` (probability, q_S + q_T) of the
      whole page; a record's own two fields win over them.
    title: the page's heading.

  Raises:
    ValueError: a per-token field is not as long as `tokens`, or an unknown threshold is named.
  """
  unknown = set(thresholds or {}) - set(THRESHOLDS)
  if unknown:
    raise ValueError(f'thresholds are named {" and ".join(THRESHOLDS)}, not {sorted(unknown)}')

  counts: dict[str, int] = dict.fromkeys(REGIMES, 0)
  for record in records:
    for name in _regimes(record):
      counts[name] = counts.get(name, 0) + 1
  # The four are always explained where any of them occurs; foreign names only where they occur.
  dopd = any(counts[name] for name in REGIMES)
  legend = _legend({name: n for name, n in counts.items() if n or (dopd and name in REGIMES)})

  defaults = {name: _number((thresholds or {}).get(name)) for name in THRESHOLDS}
  index = {entry['name']: i for i, entry in enumerate(legend)}
  views = [_view(record, index, defaults) for record in records]
  script = (ASSETS / 'samples.js').read_text('utf-8')
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = environment.get_template('samples.html').render(
    title=_visible(title),
    records=views,
    legend=legend,
    thresholds=defaults,
    tokens=sum(counts.values()),
    steps=sorted({view['step'] for view in views if view['step'] is not None}),
    privileged=any(view['privileged'] for view in views),
    rewarded=any(view['verdict'] for view in views),
    fields=[f for f in ('gap', 'loss') if any(view['data'][f] is not None for view in views)],
    data={
      'regimes': [{k: entry[k] for k in ('name', 'label', 'condition')} for entry in legend],
      'records': [view['data'] for view in views],
    },
    style=(ASSETS / 'samples.css').read_text('utf-8'),
    script=script,
    script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
  )
  path = Path(path)
  path.write_text(page, 'utf-8', newline='\n')
  return path


def _regimes(record: Mapping[str, Any]) -> list[str]:
  """The regime name of each token; tokens without one are `UNROUTED`."""
  names = record.get('regime')
  if names is None:
    return [UNROUTED] * len(record['tokens'])
  return [UNROUTED if name is None else str(name) for name in names]


def _legend(counts: Mapping[str, int]) -> list[dict[str, Any]]:
  """One entry a regime: the four of DOPD first, then the others by appearance."""
  total = max(sum(counts.values()), 1)
  foreign = [name for name in counts if name not in REGIMES and name != UNROUTED]
  colours = {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(foreign)}
  colours |= {UNROUTED: '#8a8a8a'} | {name: style.colour for name, style in REGIMES.items()}
  return [
    {
      'name': name,
      'label': REGIMES[name].name if name in REGIMES else '',
      'condition': REGIMES[name].condition if name in REGIMES else '',
      'colour': colours[name],
      'tint': REGIMES[name].tint if name in REGIMES else (40, 50),
      'count': count,
      'share': count / total,
    }
    for name, count in counts.items()
  ]


def _view(
  record: Mapping[str, Any], index: Mapping[str, int], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """What the template shows of a record; its `data` goes to the script."""
  tokens = list(record['tokens'])
  regimes = _regimes(record)
  data: dict[str, Any] = {}
  for field in TOKEN_FIELDS:
    values = record.get(field)
    data[field] = None if values is None else [_number(v) for v in np.asarray(values).tolist()]
  for field, values in {**data, 'regime': regimes}.items():
    if values is not None and len(values) != len(tokens):
      raise ValueError(
        f'record {record["id"]!r} has {len(tokens)} tokens but {len(values)} values of {field}'
      )
  for name in THRESHOLDS:
    data[name] = _number(record.get(name))
    if data[name] is None:
      data[name] = defaults[name]

  reward = _number(record.get('reward'))
  stop_reason = record.get('stop_reason')
  context = record.get('privileged_context')
  spans = [index[name] for name in regimes]
  return {
    'id': _visible(record['id']),
    'step': record.get('step'),
    'prompt': _visible(record['prompt']),
    'privileged_context': None if context is None else _visible(context),
    # Whether policies that see the privileged context scored the record.
    'privileged': any(data[f'privileged_{policy}_logp'] for policy in ('student', 'teacher')),
    'pictures': [_picture(picture, record['id']) for picture in record.get('pictures') or ()],
    'tokens': [
      (f'r{r}' if text else f'r{r} void', _marked(text)) for r, text in zip(spans, tokens)
    ],
    'bar': [(r, spans.count(r)) for r in sorted(set(spans))],
    'reward': reward,
    'verdict': _verdict(reward),
    'stop_reason': None if stop_reason is None else STOP_REASONS.get(stop_reason, str(stop_reason)),
    'data': data,
  }


def _picture(picture: Mapping[str, Any], record_id: Any) -> dict[str, Any]:
  """What the template draws: the image, and each box as (x, y, width, height, label)."""
  if not str(picture['src']).startswith('data:image/'):
    raise ValueError(f'record {record_id!r} has a picture that is no data URI of an image')
  boxes = picture.get('boxes') or []
  labels = picture.get('labels') or [''] * len(boxes)
  return {
    'src': picture['src'],
    'width': int(picture['width']),
    'height': int(picture['height']),
    'boxes': [
      (*(float(v) for v in (x1, y1, x2 - x1, y2 - y1)), _visible(label))
      for (x1, y1, x2, y2), label in zip(boxes, labels)
    ],
  }


def _verdict(reward: float | str | None) -> str:
  if reward is None:
    return ''
  return 'right' if reward == 1 else 'wrong' if reward == 0 else 'partial'


def _marked(piece: str) -> Markup:
  """The escaped text of a token, with an empty element, drawn as a glyph, before every newline."""
  return Markup('<i></i>\n').join(_visible(piece).split('\n'))


def _number(value: Any) -> float | str | None:
  """Five significant digits. JSON has no NaN and infinity: they go as 'nan', 'inf' and '-inf'."""
  if value is None:
    return None
  value = float(value)
  return float(f'{value:.5g}') if math.isfinite(value) else str(value)


def _visible(text: Any) -> str:
  """Control characters as their pictures: HTML would drop, normalise or refuse them.

  Lone surrogates, which UTF-8 cannot hold, become the replacement character.
  """
  return re.sub(r'[\ud800-\udfff]', '\N{REPLACEMENT CHARACTER}', str(text).translate(CONTROL))
