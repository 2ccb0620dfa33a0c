"""Statistics of paired seeds, against what they are by definition."""

import itertools
import math

import numpy as np
import pytest

from experiments import contrasts


def test_all_signs_are_flipped():
  differences = [0.3, 0.1, -0.05, 0.2, 0.02]
  flips = itertools.product([-1, 1], repeat=5)
  means = np.array([np.mean(np.multiply(differences, signs)) for signs in flips])
  want = (np.abs(means) >= abs(np.mean(differences)) - 1e-12).mean()
  assert contrasts.sign_flip(differences) == pytest.approx(want)
  assert contrasts.sign_flip([0.1] * 10) == pytest.approx(2 / 2**10)


def test_holm_by_hand():
  assert contrasts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert contrasts.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
  assert contrasts.holm([]) == []


def test_the_bootstrap_knows_both_levels():
  """With seeds alone, problems alone, and both: the variance of the mean is the sum of theirs."""
  rng = np.random.default_rng(1)
  one = np.repeat([-1, 0, 1], [100, 700, 200])
  half = 1.96 * np.std(one) / math.sqrt(1000)
  # Problems that are hard for all seeds are as uncertain for eight of them as for one.
  low, high = contrasts.bootstrap([one] * 8)
  assert (low + high) / 2 == pytest.approx(0.1, abs=0.005)
  assert (high - low) / 2 == pytest.approx(half, rel=0.1)
  low, high = contrasts.bootstrap([rng.permutation(one) for _ in range(8)])
  assert half / math.sqrt(8) * 0.9 < (high - low) / 2 < half * 0.7
  sure = [np.full(1000, sign, np.int8) for sign in (1, -1, 1, -1, 1, -1, 1, -1)]
  low, high = contrasts.bootstrap(sure)
  assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(8), rel=0.1)


def result(arm, seed, value, judged='', **more):
  rows = [{'step': 0, 'eval/accuracy': 0.1}, {'step': 9, 'eval/accuracy': value}]
  return {'arm': arm, 'seed': seed, 'rows': rows, 'judged': judged, **more}


def test_pairs_are_of_one_seed_and_runs_that_stopped_count_in_none():
  results = [result('a', s, 0.5 + 0.01 * s, '1100') for s in range(4)]
  results += [result('b', s, 0.4 + 0.01 * s, '1010') for s in (3, 2, 1, 0)]
  results += [result('c', s, 0.9, stopped='x' if s else '') for s in range(1, 4)]
  tested = [('a', 'b'), ('b', 'a'), ('a', 'x')]
  both, none = contrasts.contrasts(tested, results, 'eval/accuracy')
  assert both.difference.mean == pytest.approx(0.1) and both.difference.n == 4
  assert none.difference.mean == pytest.approx(-0.1)
  assert both.p == pytest.approx(2 / 2**4) and both.corrected == pytest.approx(3 * both.p)
  assert both.low < 0 < both.high  # by problem: one right more, one less
  assert contrasts.contrasts([('a', 'c')], results, 'eval/accuracy') == []
