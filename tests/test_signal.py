"""What tokens are by construction, and the statistic that holds signals against it."""

import itertools

import numpy as np
import pytest

from dopd_jax import config as configs
from dopd_jax import tasks
from dopd_jax.data import Example, Record
from dopd_jax.losses.routing import Regime
from experiments import grid
from experiments.signal import __main__ as signal
from experiments.signal import kinds


def example(prompt, *routes):
  extra = {'route': list(routes[0]), 'other_route': list(*routes[1:]) or None, 'modulus': 7}
  return Example(0, Record(id=prompt, prompt=prompt, extra=extra), [], [])


def kinds_of(answers, *examples):
  tokenizer = tasks.plan_execute.tokenizer()
  tokens = np.array([tokenizer.convert_tokens_to_ids(answer.split()) for answer in answers])
  mask = tokens != tokenizer.eos_token_id
  found = kinds.kinds(examples, tokenizer, tokens, mask)
  return {name: here.astype(int).tolist() for name, here in found.items()}


ONE = 'a = 3\nb a +5\nc = 2\nd c +5\n? b'
TWO = 'a = 3\nb a +5\nc = 2\nb c -1\nd = 6\n? b'


def test_a_plan_token_is_told_where_only_the_hint_says_which_chain_is_meant():
  answer = 'a 3 b 1 <|im_end|> a'
  found = kinds_of([answer, answer], example(ONE, 'ab'), example(TWO, 'ab', 'cb'))
  assert found['execution'] == [[0, 1, 0, 1, 0, 0]] * 2
  assert [row[:4] for row in found['plan']] == [[1, 0, 1, 0]] * 2
  assert found['told'] == [[0] * 6, [1, 0, 0, 0, 0, 0]]
  assert [row[:4] for row in found['untold']] == [[1, 0, 1, 0], [0, 0, 1, 0]]
  assert found['first'] == [[1, 0, 0, 0, 0, 0], [0] * 6]
  assert [row[:4] for row in found['others']] == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_value_that_begins_an_answer_is_no_plan():
  found = kinds_of(['3 a 1 b'], example(TWO, 'ab', 'cb'))
  assert found['told'] == [[0, 0, 0, 0]] and found['first'] == [[0, 0, 0, 0]]
  assert found['others'] == [[1, 1, 1, 1]] and found['wrong execution'] == [[1, 0, 0, 0]]


def test_the_first_token_that_does_not_follow_is_the_wrong_one():
  answers = {  # 3 + 5 is 1 modulo 7; what comes after a mistake is not judged
    'a 3 b 1': ('rrrr', ONE, 'ab'),
    'a 3 b 8': ('rrrw', ONE, 'ab'),
    'a 4 b 2': ('rw--', ONE, 'ab'),
    'c 2 b 1': ('w---', ONE, 'ab'),
    'a 3 d 0': ('rrw-', ONE, 'ab'),
    'c 2 b 1 ': ('rrrr', TWO, 'ab', 'cb'),
    'd 6 b 1': ('w---', TWO, 'ab', 'cb'),
    'a 3 4 b': ('rrw-', TWO, 'ab', 'cb'),
    'a b 1 b': ('rw--', TWO, 'ab', 'cb'),
  }
  found = kinds_of(answers, *(example(*about[1:]) for about in answers.values()))
  got = [
    ''.join('r' if r else 'w' if w else '-' for r, w in zip(*rows))
    for rows in zip(found['right'], found['wrong'])
  ]
  assert got == [about[0] for about in answers.values()]
  assert found['wrong plan'][3] == [1, 0, 0, 0] and found['wrong execution'][1] == [0, 0, 0, 1]


def test_what_the_tokens_of_a_chain_are():
  """Up to the first wrong token as wanted, and right; line ends and the answer are no kind."""
  right = '1 + 2 = 3 \n 3 - 5 = -2 \n #### -2'
  answers = {
    right: 'rrrrr-rrrrr---',
    '1 + 2 = 4 \n 4 - 5 = -1 \n #### -1': 'rrrrw---------',
    '1 + 2 = + \n 3 - 5 = -2 \n #### -2': 'rrrrw---------',
    '1 - 2 = -1 \n -1 - 5 = -6 \n #### -6': 'rw------------',
    '1 + 2 = 3 3 - 5 = -2': 'rrrrr------',
    '1 + 2 =': 'rrrr',
  }
  tokenizer = tasks.reasoning.tokenizer()
  record = Record(id='a', prompt='', completion=right.replace(' \n ', '\n'))
  rows = [tokenizer(answer)['input_ids'] for answer in answers]
  mask = np.array([[n <= len(row) for n in range(14)] for row in rows])  # the stop as well
  tokens = np.array([row + [tokenizer.eos_token_id] * (14 - len(row)) for row in rows])
  found = kinds.chains([Example(0, record, [], [])] * len(rows), tokenizer, tokens, mask)
  assert np.flatnonzero(found['execution'][0]).tolist() == [4, 10]
  assert np.flatnonzero(found['plan'][0]).tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
  for b, judged in enumerate(answers.values()):
    marks = zip(found['right'][b], found['wrong'][b])
    got = ''.join('r' if r else 'w' if w else '-' for r, w in marks)
    assert got == judged.ljust(14, '-')
  # A sign in the place of a value is a wrong value.
  assert found['wrong execution'].sum() == 2 and found['wrong plan'].sum() == 1


def test_auroc_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(0)
  high, low = rng.integers(0, 6, 40) + 0.0, rng.integers(0, 5, 30) + 0.0
  pairs = [(h > x) + 0.5 * (h == x) for h, x in itertools.product(high, low)]
  np.testing.assert_allclose(signal.auroc(high, low), np.mean(pairs))


def test_a_router_is_learned_from_what_it_was_made_with():
  """Logistic: the coefficients that drew the labels come back, to four standard errors."""
  rng, true = np.random.default_rng(0), np.array([-1.0, 2.0, -1.5, 0.5])
  shape = (400, 50)
  found = {name: rng.random(shape) for name in signal.FEATURES}
  logit = true[0] + sum(c * found[name] for c, name in zip(true[1:], signal.FEATURES))
  told = rng.random(shape) < 1 / (1 + np.exp(-logit))
  kind = {'told': told, 'plan': told, 'execution': ~told}
  one = signal.Looked(0, np.ones(shape[0], bool), kind, found)
  np.testing.assert_allclose(signal.fit([one]), true, atol=0.25)


@pytest.mark.slow
def test_a_pair_is_measured_and_drawn(tmp_path):
  """On the pair of the quickstart: a signal is what its name says, and the page shows it."""
  study = grid.module(grid.ROOT / 'configs/study.py')
  config = study.get_config('smoke')
  # The pair of the quickstart knows four names.
  config.data.eval = study.get_config('tuning,size=80').data.eval.replace('letters=6', 'letters=4')
  looked = signal.look(configs.validate(config))
  found = signal.measure(looked, signal.fit([looked]))
  assert found['tokens']['plan'] == found['tokens']['told'] + found['tokens']['untold']
  mean = found['mean']
  assert all(0 <= x <= np.log(2) for name in signal.PAIRS for x in mean[name].values())
  assert all(mean['gap'][kind] >= abs(mean['signed gap'][kind]) for kind in found['tokens'])
  learned = {question: by_signal['learned'] for question, by_signal in found['auroc'].items()}
  assert learned['told over all others'] > 0.6
  # What a hint tells shows where it is the only one to tell.
  assert found['auroc']['told over all others']['JS(Sp, S)'] > 0.6
  assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in found['regimes'].values())
  # A regime of large gaps has larger ones than a regime of small gaps; HS is where Sp likes more.
  regime, kind = looked.signal['regime'], looked.kind['plan'] | looked.kind['execution']
  of = lambda name, *which: looked.signal[name][kind & np.isin(regime, which)]
  assert of('gap', Regime.HT, Regime.HS).min() >= of('gap', Regime.LH, Regime.LL).max()
  assert of('signed gap', Regime.HS).max() < 0 <= of('signed gap', Regime.HT).min()
  assert np.allclose(
    looked.signal['log Tp(y)'] - looked.signal['log Sp(y)'], looked.signal['signed gap']
  )
  other = {**found, 'seed': 1}
  assert '| `gap` | ' in signal.page([found, other])
  signal.picture([found, other]).savefig(tmp_path / 'signals.png')
