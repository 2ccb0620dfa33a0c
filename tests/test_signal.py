"""What tokens are by construction, and the statistic that holds signals against it."""

import itertools

import numpy as np
import pytest

from dopd_jax import config as configs
from dopd_jax import tasks
from dopd_jax.data import Example, Record
from experiments import grid
from experiments.signal import __main__ as signal


def example(prompt, *routes):
  extra = {'route': routes[0], 'other_route': routes[1] if routes[1:] else None, 'modulus': 7}
  return Example(0, Record(id=prompt, prompt=prompt, extra=extra), [], [])


def test_a_plan_token_is_told_where_only_the_hint_says_which_chain_is_meant():
  tokenizer = tasks.plan_execute.tokenizer()
  one = 'a = 3\nb a +1\nc = 2\nd c +5\n? b'
  two = 'a = 3\nb a +1\nc = 2\nb c +2\n? b'
  words = ['a', '3', 'b', '4', tokenizer.eos_token, 'a']
  tokens = np.array([tokenizer.convert_tokens_to_ids(words)] * 2)
  mask = np.array([[1, 1, 1, 1, 1, 0]] * 2, bool)
  kinds = signal.kinds([example(one, 'ab'), example(two, 'ab', 'cb')], tokenizer, tokens, mask)
  of = lambda kind: kinds[kind].astype(int).tolist()
  assert of('execution') == [[0, 1, 0, 1, 0, 0]] * 2
  assert of('plan') == [[1, 0, 1, 0, 0, 0]] * 2
  assert of('told') == [[0] * 6, [1, 0, 0, 0, 0, 0]]
  assert of('untold') == [[1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]


def test_a_token_is_wrong_where_it_does_not_follow_from_what_was_written():
  tokenizer = tasks.plan_execute.tokenizer()
  prompt = 'a = 3\nb a +1\nc = 2\nb c +2\nd = 6\n? b'
  answers = {  # a wrong value is wrong once; what follows from it is right
    'a 3 b 4': [1, 1, 1, 1],
    'c 2 b 4': [1, 1, 1, 1],
    'a 5 b 6': [1, 0, 1, 1],
    'a 3 b 5': [1, 1, 1, 0],
    'd 6 b 4': [0, 1, 1, 0],
    'a 3 a 3': [1, 1, 0, 1],
    'a 3 4 b': [1, 1, 0, 0],
  }
  words = [answer.split() for answer in answers]
  tokens = np.array([tokenizer.convert_tokens_to_ids(w) for w in words])
  examples = [example(prompt, 'ab', 'cb')] * len(words)
  kinds = signal.kinds(examples, tokenizer, tokens, np.ones_like(tokens, bool))
  assert kinds['right'].astype(int).tolist() == list(answers.values())
  assert (kinds['wrong'] == ~kinds['right']).all()


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
  assert learned['told over other plan'] > 0.6
  # What a hint tells shows where it is the only one to tell.
  assert found['auroc']['told over other plan']['JS(Sp, S)'] > 0.6
  assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in found['regimes'].values())
  # A regime of large gaps has larger ones than a regime of small gaps.
  gap, regime, mask = (looked.signal['gap'], looked.signal['regime'], looked.kind['plan'])
  assert gap[mask & (regime >= 2)].min() > gap[mask & (regime < 2) & (regime >= 0)].max()
  other = {**found, 'seed': 1}
  assert '| `gap` | ' in signal.page([found, other])
  signal.picture([found, other]).savefig(tmp_path / 'signals.png')
