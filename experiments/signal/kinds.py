"""What every token is by construction: of plan-execute, or of a chain of sums.

plan, execution    a variable, a value
told, untold       plan tokens: the first of an answer where two chains lead to the query, so that
                   only the hint says which one is meant; all others
first              untold ones that are the first of an answer, to hold the told ones against
others             all that are not told
right, wrong       up to the first that does not follow from the prompt and what was written before;
                   a variable that no route has here, a value that is not its definition's. What
                   comes after that one is neither. A verifier takes any route, so either is right.

A chain has one right answer, whose results are execution and whose terms, signs and results taken
up again are plans. Line ends, and the answer after `####`, are none.
"""

from collections.abc import Sequence

import numpy as np

from dopd_jax import token_records
from dopd_jax.data import Example
from dopd_jax.tasks import plan_execute, reasoning

NAMES = ('plan', 'execution', 'told', 'untold', 'first', 'others', 'right', 'wrong')


def kinds(
  examples: Sequence[Example], tokenizer, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
  """[B, N] bool of every kind, and of 'right plan', 'wrong execution' and the like."""
  found = {name: np.zeros(mask.shape, bool) for name in NAMES}
  for b, example in enumerate(examples):
    definitions, query = plan_execute.parse(example.record.prompt)
    two_chains = sum(d.variable == query for d in definitions) > 1
    words = tokenizer.convert_ids_to_tokens(tokens[b])
    wrong = False
    for n, kind in enumerate(plan_execute.token_kinds(example.record, words)):
      if not mask[b, n] or kind == 'other':
        continue
      told = kind == 'plan' and n == 0 and two_chains
      of = [kind, 'told' if told else 'others']
      if kind == 'plan' and not told:
        of += ['untold'] + ['first'] * (n == 0)
      if not wrong:
        wrong = not follows(example.record, words[: n + 1], kind)
        of += ['wrong' if wrong else 'right']
      for name in of:
        found[name][b, n] = True
  return _judged(found)


def chains(
  examples: Sequence[Example], tokenizer, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
  """The same of chains of sums, without what tells told tokens.

  Up to the first wrong token the kinds are those of the right answer, so that a sign where a result
  belongs is a wrong execution; after it, those of what was written. A stop is of no kind.
  """
  found = {name: np.zeros(mask.shape, bool) for name in ('plan', 'execution', 'right', 'wrong')}
  for b, example in enumerate(examples):
    kinds_of = lambda ids, record=example.record: reasoning.token_kinds(
      record, token_records.pieces(tokenizer, ids)
    )
    wanted = tokenizer(example.record.completion)['input_ids']
    written = [t for t in tokens[b, mask[b]].tolist() if t != tokenizer.eos_token_id]
    ours = kinds_of(written)
    same = True
    for n, (token, right, kind) in enumerate(zip(written, wanted, kinds_of(wanted))):
      ours[n] = kind if same else ours[n]
      if same and kind in found:
        found['right' if token == right else 'wrong'][b, n] = True
      same = same and token == right
    for n, kind in enumerate(ours):
      if kind in found:
        found[kind][b, n] = True
  return _judged(found)


def _judged(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return found | {
    f'{judged} {kind}': found[judged] & found[kind]
    for judged in ('right', 'wrong')
    for kind in ('plan', 'execution')
  }


def follows(record, words: Sequence[str], kind: str) -> bool:
  """Whether the last word does; those before it do."""
  if kind != ('execution' if len(words) % 2 == 0 else 'plan'):
    return False  # a value where a variable belongs, or the other way round
  if kind == 'execution':
    stated = plan_execute.score(record.prompt, ' '.join(words), record.extra['modulus'])
    return stated.execution == 1.0
  variables = list(words[::2])
  routes = (record.extra['route'], record.extra['other_route'] or [])
  return any(route[: len(variables)] == variables for route in routes)
