"""The statistics of comparisons by hand: intervals, choices, what was forgotten, and tables."""

import dataclasses
import math
import os

import pytest

from experiments import draw, results, tables
from tests.test_experiments import EXPERIMENT, result


def test_an_interval_by_hand():
  # s = 0.1, t(0.975; 2) = 4.302653, so 4.302653 * 0.1 / sqrt(3).
  got = results.estimate([0.5, 0.6, 0.7])
  assert got.n == 3
  assert got.mean == pytest.approx(0.6)
  assert got.half == pytest.approx(0.2484138, rel=1e-6)
  assert results.estimate([0.4, 0.4]).half == 0.0
  assert results.estimate([0.4]).mean == 0.4
  assert math.isnan(results.estimate([0.4]).half)
  assert results.estimate([]).n == 0


def test_a_paired_interval_by_hand():
  # Differences 0.1, 0.2, -0.1: mean 0.2 / 3, s = sqrt(0.07 / 3); seeds 3 and 4 have no partner.
  ours, reference = {0: 0.6, 1: 0.7, 2: 0.8, 3: 0.0}, {2: 0.9, 1: 0.5, 0: 0.5, 4: 1.0}
  got = results.paired(ours, reference)
  assert got.n == 3
  assert got.mean == pytest.approx(0.2 / 3)
  assert got.half == pytest.approx(4.3026527 * math.sqrt(0.07 / 3 / 3), rel=1e-6)
  # What a seed adds to both arms says nothing about their difference.
  shift = {0: 5.0, 1: -3.0, 2: 1.0, 3: 0.0, 4: 0.0}
  moved = [{s: v + shift[s] for s, v in arm.items()} for arm in (ours, reference)]
  assert results.paired(*moved) == pytest.approx(got)


@pytest.mark.parametrize(
  ('cells', 'best'),
  [
    ({2e-4: [0.5, 0.6], 5e-4: [0.6, 0.7], 1e-3: [0.9, 0.1]}, 5e-4),
    ({1e-3: [0.5, 0.7], 5e-4: [0.6, 0.6], 2e-4: [0.1, 0.1]}, 5e-4),  # a tie
    ({1e-3: [0.1, 0.2, 0.3], 5e-4: [0.3, 0.2, 0.1]}, 5e-4),  # a tie but for the last bit
    ({2e-4: [0.1, 0.1], 5e-4: [0.9, -math.inf]}, 2e-4),
    ({5e-4: [-math.inf] * 2, 2e-4: [-math.inf] * 2}, 2e-4),
  ],
)
def test_the_best_mean_chooses_and_the_smaller_rate_of_equals(cells, best):
  assert results.choose(cells) == best


def test_stopped_runs_count_in_no_mean_and_are_told():
  found = [result('opd', s, 0.6) for s in (0, 1, 2)]
  found += [result('dopd', 0, 0.4), result('dopd', 1, 0.5), result('dopd', 2, 0.9, stopped='x')]
  opd, dopd = results.summarise(EXPERIMENT, found)
  assert dopd.finals == {0: 0.4, 1: 0.5}
  assert dopd.final.mean == pytest.approx(0.45)
  assert dopd.difference.mean == pytest.approx(-0.15)
  assert dopd.means == pytest.approx({'train/entropy/S': 0.45})
  assert opd.final == pytest.approx((0.6, 0.0, 3))
  table, *tuning = tables.tables(EXPERIMENT, found, [])
  assert not tuning
  # t(0.975; 1) = 12.7062, s / sqrt(2) = 0.05 for both
  assert table.rows[0][:6] == ['opd', '0.0005', '3', '50.0', '60.0 ± 0.0', '–']
  half = '45.0 ± 63.5', '-15.0 ± 63.5'
  assert table.rows[1][:6] == ['dopd', '0.0005', '2 (1 stopped)', '50.0', *half]
  assert table.rows[1][6] == '0.45'
  draw.figure(EXPERIMENT, found).savefig(os.devnull, format='png')


def test_what_was_forgotten_by_hand():
  """Of the best look before the last: .9 - .6 and .8 - .9; a stopped run does not count."""
  experiment = dataclasses.replace(EXPERIMENT, also=('eval/accuracy/plus',), looks=(1, 2, 3))

  def looked(seed, *values, **more):
    made = result('opd', seed, 0.5, **more)
    made['rows'] += [
      {'step': step, 'eval/accuracy/plus': value} for step, value in enumerate(values, 1)
    ]
    return made

  found = [looked(0, 0.9, 0.7, 0.6), looked(1, 0.5, 0.8, 0.9), looked(2, 0.9, 0.9, 0, stopped='x')]
  (arm,) = results.summarise(experiment, found)
  got = results.forgotten(arm, 'eval/accuracy/plus', (1, 2, 3))
  assert (got.n, got.mean) == (2, pytest.approx(0.1))
  _, looks = tables.tables(experiment, found, [])
  assert [row[0] for row in looks.rows] == [
    'opd, step 1',
    'opd, step 2',
    'opd, step 3',
    'opd, forgotten',
  ]
  # t(0.975; 1) = 12.7062 times half of each pair's distance: .4, .1, .3 and .4
  cells = ['70.0 ± 254.1', '75.0 ± 63.5', '75.0 ± 190.6', '+10.0 ± 254.1']
  assert [row[1] for row in looks.rows] == cells


def test_one_seed_has_no_interval_and_an_arm_without_results_no_row():
  alone = tables.tables(EXPERIMENT, [result('dopd', 0, 0.4)], [])[0].rows
  assert alone == [['dopd', '0.0005', '1', '50.0', '40.0 ± –', '–', '0.4']]
  both = [result('opd', 0, 0.3), result('dopd', 0, 0.4)]
  second = tables.tables(EXPERIMENT, both, [])[0].rows[1]
  assert second[4:6] == ['40.0 ± –', '+10.0 ± –']
  page = tables.page(EXPERIMENT, 'x', [], [result('dopd', 0, 0.4)])
  assert 'Not run yet: opd.' in page
