"""The samples page, read back by an HTML parser: what it shows, and what it cannot do."""

import base64
import hashlib
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dopd_jax.samples import OTHER_COLOURS, REGIMES, UNROUTED, write_samples


class Page(HTMLParser):
  """The elements of a page, and the text of those that the tests look into."""

  def __init__(self, path):
    super().__init__(convert_charrefs=True)
    self.source = path.read_text('utf-8')
    self.elements = []  # (tag, attributes)
    self.open = []  # indices into elements
    self.texts = {}  # index -> all text within
    self.parents = {}
    self.feed(self.source)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    index = len(self.elements) - 1
    self.texts[index] = ''
    self.parents[index] = self.open[-1] if self.open else None
    if tag not in ('meta', 'img', 'input', 'br'):
      self.open.append(index)

  def handle_endtag(self, tag):
    assert self.elements[self.open[-1]][0] == tag, (tag, self.elements[self.open[-1]])
    self.open.pop()

  def handle_data(self, data):
    for index in self.open:
      self.texts[index] += data

  def find(self, tag=None, **attributes):
    """Indices of the elements of a tag whose attributes contain the given words."""
    return [
      i
      for i, (t, a) in enumerate(self.elements)
      if tag in (None, t)
      and all(
        v in (a.get(k.rstrip('_').replace('_', '-')) or '').split() for k, v in attributes.items()
      )
    ]

  def completions(self):
    """One list of (class, text) a record that has tokens."""
    return [
      [
        (a['class'], self.texts[i])
        for i, (_, a) in enumerate(self.elements)
        if self.parents[i] == block
      ]
      for block in self.find('div', class_='completion')
    ]

  def data(self):
    (index,) = self.find(id='data')
    return json.loads(self.texts[index], parse_constant=lambda c: pytest.fail(f'{c} in JSON'))

  def legend(self):
    """Regime name -> (count, share in per cent) as shown."""
    shown = {}
    for i in self.find('button', type='button'):
      words = {
        a.get('class'): self.texts[j]
        for j, (_, a) in enumerate(self.elements)
        if self.parents[j] == i
      }
      name = next(self.texts[j] for j in self.find('b') if self.parents[j] == i)
      share = float(words['share'].removesuffix('\N{NO-BREAK SPACE}%'))
      shown[name] = (int(words['count'].replace(',', '')), share)
    return shown


def record(**changes):
  base = {
    'id': 'sum/7',
    'step': 20,
    'prompt': 'What is 2 + 3?',
    'privileged_context': 'Add the two numbers.',
    'tokens': ['The', ' answer', ' is', '\n', ' 5'],
    'student_logp': [-0.11, -0.22, -0.33, -0.44, -0.55],
    'privileged_student_logp': [-1.11, -1.22, -1.33, -1.44, -1.55],
    'privileged_teacher_logp': [-2.11, -2.22, -2.33, -2.44, -2.55],
    'gap': [0.71, 0.72, 0.73, 0.74, 0.75],
    'regime': ['LH', 'HT', 'HT', 'LL', 'HT'],
    'loss': [0.011, 0.012, 0.013, 0.014, 0.015],
    'stop_reason': 'stop',
    'reward': 1.0,
  }
  return base | changes


def page_of(tmp_path, records, **kwargs):
  return Page(write_samples(records, tmp_path / 'samples.html', **kwargs))


def test_every_token_is_there_once_with_its_numbers(tmp_path):
  first, second = record(), record(id='sum/8', loss=[0.021, 0.022, 0.023, 0.024, 0.025], reward=0)
  page = page_of(tmp_path, [first, second])
  names = [entry['name'] for entry in page.data()['regimes']]
  for shown, data, given in zip(
    page.completions(), page.data()['records'], (first, second), strict=True
  ):
    assert [text for _, text in shown] == given['tokens']
    assert [names[int(classes.split()[0][1:])] for classes, _ in shown] == given['regime']
    for field in (
      'student_logp',
      'privileged_student_logp',
      'privileged_teacher_logp',
      'gap',
      'loss',
    ):
      assert data[field] == given[field]
  for block in page.find('div', class_='completion'):
    assert page.texts[block] == ''.join(first['tokens'])  # and nothing between them
  for value in ('-1.11', '0.025'):  # once in the page for each record that has it
    assert page.source.count(value) == sum(json.dumps(r).count(value) for r in (first, second))


def test_legend_counts_and_shares(tmp_path):
  records = [record(), record(tokens=['x'], regime=['HS'], **dict.fromkeys(('gap', 'loss')))]
  for name in ('student_logp', 'privileged_student_logp', 'privileged_teacher_logp'):
    records[1][name] = [-1.0]
  assert page_of(tmp_path, records).legend() == {
    'LH': (1, 16.7),
    'LL': (1, 16.7),
    'HT': (3, 50.0),
    'HS': (1, 16.7),
  }


def test_the_four_regimes_are_explained_where_one_occurs(tmp_path):
  page = page_of(tmp_path, [record(regime=['HT'] * 5)])
  assert page.legend() == {'LH': (0, 0.0), 'LL': (0, 0.0), 'HT': (5, 100.0), 'HS': (0, 0.0)}


def test_regimes_of_other_objectives(tmp_path):
  page = page_of(tmp_path, [record(regime=['all', 'all', '<b>"odd"</b>', None, 'all'])])
  assert page.legend() == {'all': (3, 60.0), '<b>"odd"</b>': (1, 20.0), UNROUTED: (1, 20.0)}
  assert [c for c, _ in page.completions()[0]] == ['r0', 'r0', 'r1', 'r2', 'r0']
  (style,) = page.find('style')
  assert f'.r0 {{ --c: {OTHER_COLOURS[0]}' in page.texts[style]
  assert f'.r1 {{ --c: {OTHER_COLOURS[1]}' in page.texts[style]


def test_a_record_with_nothing_but_text(tmp_path):
  page = page_of(tmp_path, [{'id': 0, 'prompt': 'Hi', 'tokens': ['Hel', 'lo']}])
  assert [text for _, text in page.completions()[0]] == ['Hel', 'lo']
  assert page.legend() == {UNROUTED: (2, 100.0)}
  assert set(page.data()['records'][0].values()) == {None}
  assert not page.find(class_='badge') and not page.find(class_='privileged')
  assert not page.find('select')  # nothing to filter or to colour by
  assert 'Tp' not in page.texts[page.find('header')[0]]  # no privileged policy, no word of one


EVIL = [
  '</script><script>alert(1)</script>',
  '<img src=x onerror=alert(2)>',
  '<!--',
  '"><svg/onload=alert(3)>',
  "' onmouseover='alert(4)",
  ']]>&lt;{{ 7 * 7 }}{% raw %}',
]


def test_text_cannot_become_markup(tmp_path):
  n = len(EVIL)
  evil = record(
    id=EVIL[1],
    step=None,
    prompt=EVIL[0],
    privileged_context=EVIL[3],
    tokens=EVIL,
    regime=EVIL,
    stop_reason=EVIL[0],
    **dict.fromkeys(
      ('student_logp', 'privileged_student_logp', 'privileged_teacher_logp'), [-1.0] * n
    ),
    gap=[1.0] * n,
    loss=[1.0] * n,
  )
  page = page_of(tmp_path, [evil], title=EVIL[0])
  harmless = page_of(
    tmp_path,
    [
      record(
        tokens=['a'] * n,
        regime=list('abcdef'),
        stop_reason='x',
        step=None,
        **{
          k: evil[k]
          for k in (
            'student_logp',
            'privileged_student_logp',
            'privileged_teacher_logp',
            'gap',
            'loss',
          )
        },
      )
    ],
  )
  assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
  assert [sorted(a) for _, a in page.elements] == [sorted(a) for _, a in harmless.elements]
  assert [text for _, text in page.completions()[0]] == EVIL
  assert [entry['name'] for entry in page.data()['regimes']] == EVIL
  assert page.texts[page.find('h1')[0]] == EVIL[0]
  assert page.texts[page.find('h2')[0]] == EVIL[1]


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path):
  page = page_of(tmp_path, [record()])
  for tag, attributes in page.elements:
    assert tag not in ('link', 'img', 'iframe', 'object', 'embed', 'base', 'form')
    assert not {'src', 'href', 'srcset', 'data', 'action'} & set(attributes)
    assert not any(name.startswith('on') for name in attributes)
  assert not re.search(r'https?:|//[a-z]|url\(|@import|import\(|fetch\(|XMLHttp', page.source)

  policy = next(a['content'] for _, a in page.elements if 'http-equiv' in a)
  scripts = [page.texts[i] for i in page.find('script') if page.elements[i][1] == {}]
  digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
  assert len(scripts) == 1 and scripts[0].startswith("'use strict'")
  assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_numbers_that_are_not_finite(tmp_path):
  odd = [math.nan, math.inf, -math.inf, None, 0.1234567]
  page = page_of(tmp_path, [record(gap=odd, loss=np.array([1, 2, math.nan, 4, 5], np.float32))])
  assert page.data()['records'][0]['gap'] == ['nan', 'inf', '-inf', None, 0.12346]
  assert page.data()['records'][0]['loss'] == [1.0, 2.0, 'nan', 4.0, 5.0]


def test_text_that_html_and_utf8_do_not_hold(tmp_path):
  tokens = ['a\r\n', '', '\x00\x1b', '\ud83d', '\t \n\n']
  page = page_of(tmp_path, [record(tokens=tokens)])
  shown = page.completions()[0]
  assert [text for _, text in shown] == ['a\u240d\n', '', '\u2400\u241b', '\ufffd', '\t \n\n']
  assert 'void' in shown[1][0]
  (block,) = page.find('div', class_='completion')
  glyphs = [i for i in page.find('i') if page.parents[page.parents[i]] == block]
  assert len(glyphs) == 3  # one for each newline


def test_badges_and_how_a_completion_ended(tmp_path):
  page = page_of(
    tmp_path,
    [record(reward=1.0, stop_reason=0), record(reward=0, stop_reason=1), record(reward=0.25)],
  )
  badges = [page.texts[i] for i in page.find('span', class_='badge')]
  assert badges == ['✓ right', '✗ wrong', 'reward 0.25']
  assert [a['data-verdict'] for t, a in page.elements if t == 'article'] == [
    'right',
    'wrong',
    'partial',
  ]
  ends = [page.texts[i] for i in page.find('span', class_='meta')]
  assert [end.rpartition(' · ')[2] for end in ends] == [
    'stopped by itself',
    'cut at the length limit',
    'stopped by itself',
  ]


def test_prompt_and_privileged_context_fold(tmp_path):
  page = page_of(tmp_path, [record(), record(privileged_context=None, prompt='long ' * 200)])
  folds = [i for i in page.find('details') if 'help' not in page.elements[i][1].get('class', '')]
  assert ['open' in page.elements[i][1] for i in folds] == [True, False, False]
  assert [page.texts[i].split('?')[0][:30] for i in folds[:2]] == [
    'PromptWhat is 2 + 3',
    'Privileged context (seen by Sp',
  ]


def test_a_records_thresholds_win_over_the_pages(tmp_path):
  page = page_of(
    tmp_path,
    [record(), record(gap_threshold=np.float32(0.5))],
    thresholds={'gap_threshold': 0.8, 'confidence_threshold': 1.2},
  )
  assert [(r['gap_threshold'], r['confidence_threshold']) for r in page.data()['records']] == [
    (0.8, 1.2),
    (0.5, 1.2),
  ]
  assert 'gap threshold 0.8 nats' in page.texts[page.find('header')[0]]


def test_no_records_and_no_tokens(tmp_path):
  assert 'There are no samples to show.' in page_of(tmp_path, []).texts[0]
  fields = ('student_logp', 'privileged_student_logp', 'privileged_teacher_logp', 'gap', 'loss')
  page = page_of(tmp_path, [record(tokens=[], regime=[], **{f: [] for f in fields})])
  assert page.completions() == []
  assert 'The completion has no tokens.' in page.texts[page.find('article')[0]]


def test_mistakes_of_the_caller(tmp_path):
  with pytest.raises(ValueError, match=r"'sum/7' has 5 tokens but 4 values of gap"):
    write_samples([record(gap=[1.0] * 4)], tmp_path / 'x.html')
  with pytest.raises(ValueError, match='5 tokens but 6 values of regime'):
    write_samples([record(regime=['LH'] * 6)], tmp_path / 'x.html')
  with pytest.raises(ValueError, match='thresholds are named'):
    write_samples([record()], tmp_path / 'x.html', thresholds={'gap': 1.0})
  assert not (tmp_path / 'x.html').exists()


# --- Colours: CIE L*a*b* distances as eyes with each dichromacy see them.

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
  'trichromat': np.eye(3),
  'protanope': np.array(
    [
      [0.152286, 1.052583, -0.204868],
      [0.114503, 0.786281, 0.099216],
      [-0.003882, -0.048116, 1.051998],
    ]
  ),
  'deuteranope': np.array(
    [
      [0.367322, 0.860646, -0.227968],
      [0.280085, 0.672501, 0.047413],
      [-0.011820, 0.042940, 0.968881],
    ]
  ),
  'tritanope': np.array(
    [
      [1.255528, -0.076749, -0.178779],
      [-0.078411, 0.930809, 0.147602],
      [0.004733, 0.691367, 0.303900],
    ]
  ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def srgb(colour):
  return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def linear(colour):
  return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def lab(colour, vision):
  x = TO_XYZ @ np.clip(vision @ linear(colour), 0, 1) / [0.9505, 1.0, 1.089]
  f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
  return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize('vision', VISION)
@pytest.mark.parametrize('page', ['#fcfcfb', '#16181b'])
def test_regimes_stay_apart_for_every_eye(page, vision):
  tinted = {}
  for name, style in REGIMES.items():
    share = style.tint[page == '#16181b'] / 100
    tinted[name] = share * srgb(style.colour) + (1 - share) * srgb(page)
  for a, b in itertools.combinations(REGIMES, 2):
    for colours in (tinted, {name: srgb(style.colour) for name, style in REGIMES.items()}):
      assert np.linalg.norm(lab(colours[a], VISION[vision]) - lab(colours[b], VISION[vision])) > 11


@pytest.mark.parametrize('page, ink', [('#fcfcfb', '#1c1d1f'), ('#16181b', '#e7e8ea')])
def test_token_text_is_readable_on_every_regime(page, ink, tmp_path):
  source = write_samples([record()], tmp_path / 'x.html').read_text('utf-8')
  assert f'--page: {page}; --ink: {ink}' in source
  for style in REGIMES.values():
    share = style.tint[page == '#16181b'] / 100
    fill = share * srgb(style.colour) + (1 - share) * srgb(page)
    low, high = sorted(TO_XYZ[1] @ linear(c) for c in (fill, srgb(ink)))
    assert (high + 0.05) / (low + 0.05) > 4.5  # WCAG 2 AA


PIXEL = 'data:image/png;base64,iVBORw0KGgo='


def test_a_picture_stands_with_its_boxes(tmp_path):
  record = {
    'id': 'a', 'prompt': 'where?', 'tokens': ['x'],
    'pictures': [{'src': PIXEL, 'width': 40, 'height': 30, 'boxes': [[1, 2, 11, 22]],
                  'labels': ['<b>digit']}],
  }  # fmt: skip
  page = Page(write_samples([record], tmp_path / 'page.html'))
  (image,) = page.find('image')
  assert page.elements[image][1]['href'] == PIXEL
  (box,) = page.find('rect')
  at = page.elements[box][1]
  assert [float(at[k]) for k in ('x', 'y', 'width', 'height')] == [1, 2, 10, 20]
  assert page.texts[box] == '<b>digit'
  assert 'img-src data:' in page.source


def test_a_picture_from_elsewhere_is_refused(tmp_path):
  """The page must not ask anyone for anything."""
  record = {'id': 'a', 'prompt': '', 'tokens': [], 'pictures': [
    {'src': 'https://example.org/a.png', 'width': 1, 'height': 1}]}  # fmt: skip
  with pytest.raises(ValueError, match='no data URI'):
    write_samples([record], tmp_path / 'page.html')
