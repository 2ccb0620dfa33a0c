"""Differences between two arms, paired by seed, for the contrasts that were named beforehand.

sign_flip   permutation test, exact up to 16 seeds: under no difference a sign is a fair coin
bootstrap   95 % interval over seeds and over the problems that all were judged on
holm        p values of several contrasts, corrected so that all hold together
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.results import Estimate, final, paired


class Contrast(NamedTuple):
  """What the results say of `arm` minus `reference`."""

  arm: str
  reference: str
  difference: Estimate  # paired by seed, with its t-interval
  low: float  # of the bootstrap over seeds and problems; NaN where no problems are known
  high: float
  p: float  # of the sign flips, two-sided; 2**(1 - n) at least
  corrected: float  # by Holm over all contrasts of the experiment


def contrasts(
  pairs: Sequence[tuple[str, str]], results: Sequence[Mapping[str, Any]], metric: str
) -> list[Contrast]:
  """Of every pair that has two seeds or more in common.

  Args:
    pairs: (arm, reference).
    results: result files; runs that were stopped count in no pair.
    metric: whose last value is compared.
  """
  finals: dict[str, dict[int, float]] = {}
  judged: dict[str, dict[int, np.ndarray]] = {}
  for result in results:
    value = final(result, metric)
    if math.isfinite(value):
      finals.setdefault(result['arm'], {})[result['seed']] = value
      if result.get('judged') and metric == 'eval/accuracy':  # what the bootstrap draws from
        judged.setdefault(result['arm'], {})[result['seed']] = np.array(
          list(result['judged']), np.int8
        )
  found = []
  for arm, reference in pairs:
    seeds = sorted(finals.get(arm, {}).keys() & finals.get(reference, {}).keys())
    if len(seeds) < 2:
      continue
    difference = paired(
      *({seed: finals[name][seed] for seed in seeds} for name in (arm, reference))
    )
    p = sign_flip([finals[arm][seed] - finals[reference][seed] for seed in seeds])
    known = [judged.get(name, {}) for name in (arm, reference)]
    both = [known[0][s] - known[1][s] for s in seeds if s in known[0] and s in known[1]]
    low, high = bootstrap(both) if len(both) == len(seeds) else (np.nan, np.nan)
    found.append(Contrast(arm, reference, difference, low, high, p, p))
  missing = [1.0] * (len(pairs) - len(found))  # those that are not run yet count as well
  corrected = holm([*(c.p for c in found), *missing])
  return [c._replace(corrected=p) for c, p in zip(found, corrected)]


def sign_flip(differences: Sequence[float]) -> float:
  """Two-sided p of a mean difference of 0: the share of all sign flips that are as far from it."""
  result = stats.permutation_test(
    (np.asarray(differences, np.float64),),
    np.mean,
    permutation_type='samples',
    n_resamples=2**16,
    rng=np.random.default_rng(0),
  )
  return float(result.pvalue)


def bootstrap(
  differences: Sequence[np.ndarray], draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
  """95 % percentile interval of the mean: seeds are drawn again, and problems, the same for all.

  Args:
    differences: of each seed, what one arm has right minus the other, problem by problem; [n] of
      -1, 0 and 1, in the same order.
    draws: how many means.
    seed: of the draws.
  """
  rng, D = np.random.default_rng(seed), np.stack(differences).astype(np.float64)
  S, n = D.shape
  seeds = rng.multinomial(S, np.full(S, 1 / S), draws)
  problems = rng.multinomial(n, np.full(n, 1 / n), draws)
  means = ((seeds @ D) * problems).sum(axis=1) / (S * n)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
  """Holm's step-down: the i-th smallest of m times m - i + 1, never below one before it."""
  order = np.argsort(p, kind='stable')
  found, least = np.empty(len(p)), 0.0
  for rank, place in enumerate(order):
    least = max(least, min(1.0, (len(p) - rank) * p[place]))
    found[place] = least
  return found.tolist()
