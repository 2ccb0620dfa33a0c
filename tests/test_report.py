"""The report: picture and table show the numbers of the rows, and bad files are survived."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dopd_jax.errors import UserError
from dopd_jax.glossary import METRICS, metric
from dopd_jax.report import (
  MAIN,
  figure,
  read_metrics,
  series,
  summary_table,
  wilson_interval,
  write_report,
)
from dopd_jax.samples import REGIMES

KINDS = (
  'regime_share',
  'regime_share_right',
  'regime_share_wrong',
  'regime_loss',
  'head_grad_norm',
)
ROOT = Path(__file__).parent.parent


def full_rows(n):
  """`n` steps with every metric; accuracy at every fifth step and before training."""
  rng = np.random.default_rng(0)
  rows = []
  for step in range(n + 1):
    row = {'step': step}
    if step % 5 == 0:
      row |= {
        'eval/accuracy': 0.3 + step / 1000,
        'eval/accuracy_low': 0.25,
        'eval/accuracy_high': 0.4,
      }
      row |= {'eval/teacher_accuracy': 0.66} if step == 0 else {}
    if step:
      for name in METRICS:
        if name.startswith(('train/', 'time/')) and '<' not in name:
          row[name] = float(rng.uniform(0.5, 1.0))
      for kind in KINDS:
        values = rng.dirichlet(np.ones(4))
        row |= {f'train/{kind}/{r}': float(v) for r, v in zip(REGIMES, values)}
    rows.append(row)
  return rows


def panel(drawn, title):
  """The axes of a panel."""
  (found,) = [axes for axes in drawn.axes if axes.get_title(loc='left') == title]
  return found


def line(axes, label):
  (found,) = [line for line in axes.lines if line.get_label() == label]
  return found


TITLES = [
  'Accuracy on held-out prompts',
  'Entropy (nats)',
  'Loss (nats)',
  'Regime shares',
  'Regime shares, right answers',
  'Regime shares, wrong answers',
  'Privilege advantage gap (nats)',
  'Confidence (q_S + q_T)',
  'Gradient norm',
  'Completion length (tokens)',
  'Truncated completions',
  'Sampler/trainer log-prob gap (nats)',
]


def test_every_panel_is_there_in_order():
  assert [axes.get_title(loc='left') for axes in figure(full_rows(10)).axes] == TITLES


@pytest.mark.parametrize(
  'absent, titles',
  [
    ('eval/accuracy', TITLES[:1]),
    ('train/entropy/', TITLES[1:2]),
    (('train/loss', 'train/regime_loss'), TITLES[2:3]),
    ('train/regime_share/', TITLES[3:4]),
    ('train/regime_share_right/', TITLES[4:5]),
    ('train/gap', TITLES[6:7]),
    ('train/confidence', TITLES[7:8]),
    ('train/rollout_logp_gap', TITLES[11:]),
  ],
)
def test_a_panel_without_metrics_is_left_out(absent, titles):
  rows = [{k: v for k, v in row.items() if not k.startswith(absent)} for row in full_rows(6)]
  left = [title for title in TITLES if title not in titles]
  assert [axes.get_title(loc='left') for axes in figure(rows).axes] == left


def test_lines_are_the_rows():
  rows = full_rows(10)
  drawn = figure(rows)
  for title, label, name in [
    ('Loss (nats)', 'all', 'train/loss'),
    ('Entropy (nats)', 'S', 'train/entropy/S'),
    ('Entropy (nats)', 'Sp', 'train/entropy/Sp'),
    ('Entropy (nats)', 'Tp', 'train/entropy/Tp'),
    ('Privilege advantage gap (nats)', 'mean', 'train/gap'),
    ('Privilege advantage gap (nats)', 'threshold', 'train/gap_threshold'),
    ('Loss (nats)', 'HS', 'train/regime_loss/HS'),
    ('Confidence (q_S + q_T)', 'threshold', 'train/confidence_threshold'),
    ('Gradient norm', 'parameters', 'train/grad_norm'),
    ('Gradient norm', 'HT', 'train/head_grad_norm/HT'),
  ]:
    x, y = line(panel(drawn, title), label).get_data()
    expected = [(row['step'], row[name]) for row in rows if name in row]
    assert list(zip(x, y)) == expected
  for title, name in [
    ('Completion length (tokens)', 'train/completion_length'),
    ('Truncated completions', 'train/truncated_share'),
  ]:
    (only,) = panel(drawn, title).lines
    assert list(only.get_ydata()) == [row[name] for row in rows if name in row]


def test_lines_use_a_regimes_own_colour():
  axes = panel(figure(full_rows(10)), 'Gradient norm')
  for name, style in REGIMES.items():
    assert line(axes, name).get_color() == style.colour


def test_accuracy_with_interval_teacher_and_start():
  rows = full_rows(10)
  axes = panel(figure(rows), 'Accuracy on held-out prompts')
  assert list(zip(*line(axes, 'student').get_data())) == [(0, 0.3), (5, 0.305), (10, 0.31)]
  assert list(line(axes, 'teacher').get_ydata()) == [0.66, 0.66]
  assert list(line(axes, 'before training').get_ydata()) == [0.3, 0.3]
  (band,) = [c for c in axes.collections if c.get_label() == '95 % interval']
  corners = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
  assert {(float(s), e) for s in (0, 5, 10) for e in (0.25, 0.4)} <= corners


def test_no_start_line_for_a_run_whose_first_evaluation_is_later():
  axes = panel(figure(full_rows(10)[1:]), 'Accuracy on held-out prompts')
  assert [line.get_label() for line in axes.lines] == ['student']


def test_shares_are_stacked_and_a_step_without_a_share_is_bridged():
  rows = full_rows(4)
  for name in REGIMES:  # no right answer at step 2; JSON's null at 3
    del rows[2][f'train/regime_share_right/{name}']
    rows[3][f'train/regime_share_right/{name}'] = None
  axes = panel(figure(rows), 'Regime shares, right answers')
  areas = {area.get_label(): area for area in axes.collections}
  assert list(areas) == list(REGIMES)
  below = {1: 0.0, 4: 0.0}
  for name, area in areas.items():
    vertices = area.get_paths()[0].vertices
    assert {x for x, _ in vertices} == {1.0, 4.0}
    for step in (1, 4):
      ends = sorted({round(y, 9) for x, y in vertices if x == step})
      top = below[step] + rows[step][f'train/regime_share_right/{name}']
      np.testing.assert_allclose(ends, [below[step], top], atol=1e-8)
      below[step] = top
  np.testing.assert_allclose(list(below.values()), 1.0)


def test_one_regime_alone_is_no_panel():
  rows = [{'step': 1, 'train/regime_share/all': 1.0, 'train/loss': 0.5}]
  assert [axes.get_title(loc='left') for axes in figure(rows).axes] == ['Loss (nats)']


def test_long_series_keep_every_row_under_a_running_mean():
  rows = [{'step': s, 'train/loss': float(s % 2)} for s in range(200)]
  raw, mean = panel(figure(rows), 'Loss (nats)').lines
  assert list(raw.get_ydata()) == [row['train/loss'] for row in rows]
  np.testing.assert_allclose(mean.get_ydata()[20:-20], 0.5)


def test_values_that_are_not_finite_are_holes():
  rows = [{'step': s, 'train/loss': v} for s, v in enumerate([0.3, math.nan, math.inf, None, 0.1])]
  (only,) = panel(figure(rows), 'Loss (nats)').lines
  np.testing.assert_array_equal(only.get_ydata(), [0.3, math.nan, math.nan, math.nan, 0.1])
  assert figure(rows[1:4]).axes == []


def test_series_sorts_and_keeps_the_last_of_a_repeated_step():
  rows = [{'step': 2, 'a': 1.0}, {'step': 1, 'a': 2.0}, {'step': 2, 'a': 3.0}, {'step': 3}]
  steps, values = series(rows, 'a')
  assert list(steps) == [1, 2] and list(values) == [2.0, 3.0]


def test_zeros_and_single_rows_draw(tmp_path):
  rows = [dict.fromkeys(full_rows(1)[1], 0.0) | {'step': 7, 'eval/accuracy': 0.0}]
  figure(rows, title='$x_{$').savefig(tmp_path / 'x.png')
  figure([]).savefig(tmp_path / 'x.png')


def write_lines(path, rows, tail=''):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows) + tail)
  return path


@pytest.mark.parametrize(
  'tail', ['', '{"step": 9, "train/lo', '{"step": 9}{"st', '12', '\n\n', '\x80']
)
def test_a_last_line_that_was_cut_is_dropped(tmp_path, tail):
  rows = full_rows(3)
  path = write_lines(tmp_path / 'metrics.jsonl', rows, tail)
  assert read_metrics(path) == rows


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
  path = write_lines(tmp_path / 'metrics.jsonl', full_rows(1), '{"step": 2, "tr\n{"step": 3}\n')
  with pytest.raises(UserError, match=r'line 3 of .*metrics.jsonl is not a metrics row'):
    read_metrics(path)
  with pytest.raises(UserError, match='there is no'):
    read_metrics(tmp_path / 'absent.jsonl')


def test_the_report_is_a_png(tmp_path):
  path = write_lines(tmp_path / 'metrics.jsonl', full_rows(3), '{"step": 4, "tr')
  image = write_report(path, tmp_path / 'report.png', title='a run').read_bytes()
  assert image.startswith(b'\x89PNG\r\n\x1a\n')
  width, height = (int.from_bytes(image[i : i + 4], 'big') for i in (16, 20))
  assert width == 2070 and height > 1500  # three columns, four lines


def table_cells(rows):
  table = summary_table(rows)
  columns = [list(column.cells) for column in table.columns]
  return {label: tuple(cells) for label, *cells in zip(*columns)}


def test_summary_has_start_end_and_best():
  rows = [
    {'step': 0, 'eval/accuracy': 0.25, 'eval/accuracy_low': 0.2, 'eval/accuracy_high': 0.31},
    {'step': 1, 'train/loss': 0.9, 'train/regime_share/HT': 0.125, 'train/gap': math.nan},
    {'step': 2, 'train/loss': 0.1, 'time/tokens_per_second': 1234.5},
    {'step': 3, 'train/loss': 0.4, 'train/regime_share/HT': 0.25, 'eval/accuracy': 0.5},
    {'step': 4, 'eval/accuracy': 0.375},
  ]
  assert table_cells(rows) == {
    'Accuracy, held out': ('25.0 % (20.0-31.0)', '37.5 %', '50.0 % at 3'),
    'Loss': ('0.9 nats', '0.4 nats', '0.1 at 2'),
    'Share of HT': ('12.5 %', '25.0 %', ''),
    'Throughput': ('1,234 tokens/s', '1,234 tokens/s', '1,234 at 2'),
  }
  assert table_cells([]) == {}


def test_summary_prints_in_eighty_columns(capsys):
  Console(width=80).print(summary_table(full_rows(10)))
  assert '30.0 % (25.0-40.0)' in capsys.readouterr().out


@pytest.mark.parametrize('successes, n', [(0, 20), (1, 20), (10, 20), (20, 20), (613, 1000)])
def test_wilson_interval_solves_its_equation(successes, n):
  # Its ends are the shares p that the score test just does not reject: |k/n - p| = z se(p).
  z = 1.959963984540054
  for p in wilson_interval(successes, n):
    assert abs(successes / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_wilson_interval_edges():
  assert wilson_interval(0, 0) == (0.0, 1.0)
  for successes, n in ((3, 2), (-1, 2), (1, 0)):
    with pytest.raises(ValueError):
      wilson_interval(successes, n)


def test_metric_names():
  assert metric('train/regime_share_wrong/HS').label == 'Share of HS, wrong'
  assert metric('train/regime_share/drop') == METRICS['train/regime_share/<regime>']._replace(
    label='Share of drop'
  )
  assert metric('unheard/of') == ('unheard/of', '', '')
  assert all(metric(name).meaning.endswith('.') for name in [*METRICS, *MAIN])
  labels = [m.label for m in METRICS.values()]
  assert not [a for a, b in itertools.combinations(labels, 2) if a == b]


def test_the_readmes_picture_is_what_its_script_draws():
  spec = importlib.util.spec_from_file_location('regimes', ROOT / 'docs' / 'regimes.py')
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  assert (ROOT / 'docs' / 'regimes.svg').read_text('utf-8') == script.picture()
