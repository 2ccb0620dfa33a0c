"""Plan-execute: follow a chain of definitions to a queried variable, with modular arithmetic.

A prompt is a shuffled list of definitions and a query; a completion names the variables that lead
to the query, each followed by its value:

    b a +3          b is a + 3
    a = 5           a is 5 (a root)
    ...
    ? d             ->   a 5 b 8 c 6 d 2

Naming a variable is planning, giving its value is execution: every token carries its kind by
construction (`token_kinds`). The privileged context is the order of the variables, the steps
without their results. Distractors are chains as long as the true one, so that a planner which does
not look at the query is right about half the time. With probability `rho` both chains lead to the
query, with one value: a fair coin, which the prompt does not show, picks the one that the reference
takes. The hint then tells what cannot be inferred, log 2 nats; a verifier accepts either chain.
"""

import functools
import hashlib
import itertools
import math
import random
from typing import Any, NamedTuple

from dopd_jax.errors import UserError
from dopd_jax.tasks.common import field, in_split
from dopd_jax.tasks.words import word_tokenizer

LETTERS = 'abcdefghijkl'
HINTS = ('steps', 'none', 'answer', 'answer_steps', 'full', 'shuffled', 'partial', 'mixed')
TRUE = ('steps', 'answer', 'answer_steps', 'full', 'partial')  # those that say something right


class Definition(NamedTuple):
  """`variable` is `function` applied to `parent`; a root has parent '=' and a digit."""

  variable: str
  parent: str
  function: str


class Problem(NamedTuple):
  """Definitions in the order shown, the query, the reference route, the other route, all values."""

  definitions: tuple[Definition, ...]
  query: str
  route: tuple[str, ...]
  other_route: tuple[str, ...] | None
  values: dict[str, int]


class Score(NamedTuple):
  """What is right in a completion.

  final: it ends with the queried variable and its right value.
  route: the variables form a route from a root to the query, nothing left out or added.
  execution: share of the stated values that follow from the stated value of a parent; 0 if none.
  """

  final: bool
  route: bool
  execution: float


def functions(ops: str = '+-*', modulus: int = 10) -> list[str]:
  """The function words of the given operators, common ones first under a Zipf law."""
  words = [f'{op}{d}' for op in ops for d in range(2 if op == '*' else 1, modulus)]
  # Not by operator, or the rare functions would all be multiplications: a fixed shuffle.
  return sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())


def apply(function: str, value: int, modulus: int = 10) -> int:
  """The value of a function word such as '+3' at a value."""
  digit = int(function[1:])
  return {'+': value + digit, '-': value - digit, '*': value * digit}[function[0]] % modulus


def tokenizer():
  """A Hugging Face tokenizer of this task: one token a word, 57 in all."""
  return word_tokenizer(['=', '?', *'0123456789', *LETTERS, *sorted(functions())])


def make_records(
  size: int,
  seed: int,
  *,
  steps: int = 4,
  definitions: int = 8,
  letters: int = 0,
  rho: float = 0.0,
  hint: str = 'steps',
  ops: str = '+-*',
  modulus: int = 10,
  zipf: float = 0.0,
  corrupt: float = 0.0,
  split: str = 'train',
) -> list[dict[str, Any]]:
  """Problems with hints, reference completions and answers.

  Train and test problems are disjoint whatever the seeds. The records of a smaller `size` are the
  first ones of a larger.

  Args:
    size: number of records; no problem comes twice.
    seed: of the problems, hints and corruptions.
    steps: K, variables of the true chain.
    definitions: shown in a prompt, distractors included; at least 2 K, at most 12.
    letters: how many names the variables are drawn from, at most 12; 0: as many as definitions.
      More names make more problems, and longer ones without names that are new.
    rho: probability of two equally valid chains, the hint telling which one the reference takes.
    hint: what the privileged context holds: 'steps' (the order of the variables), 'none', 'answer',
      'answer_steps', 'full' (the reference completion), 'shuffled' (steps of another problem,
      which lead nowhere here), 'partial' (the first variable) or 'mixed' (one of those that say
      something right; their form tells which).
    ops: operators, of '+', '-' and '*'.
    modulus: of the arithmetic, 3 to 10. Tiny models learn a prime one faster: modulo 10 they know
      the values modulo 5 long before they know which are even.
    zipf: exponent of the law by which functions are drawn; 0 is uniform. A student that learnt from
      a steep law lacks the rare functions, and can gain them from a teacher of a flat one.
    corrupt: probability that a completion holds one student-like error, a wrong value or a wrong
      variable, and goes on sensibly: from the value as stated, or back on the route. The column
      `completion_mask` is 0 on the words in error, so that nobody is trained to make them.
    split: 'train', 'test' or 'all'.

  Raises:
    UserError: an option is out of range, or there are fewer than `size` such problems.
  """
  letters = letters or definitions
  _check(size, seed, steps, definitions, letters, rho, hint, ops, modulus, zipf, corrupt)
  # Seeded by text: the same on every platform. Errors and foreign hints have generators of their
  # own, so that the arms of a study are about the same problems.
  rng, error_rng = random.Random(f'problem {seed}'), random.Random(f'error {seed}')
  other_rng, hint_rng = random.Random(f'other {seed}'), random.Random(f'hint {seed}')
  weights = {word: rank**-zipf for rank, word in enumerate(functions(ops, modulus), start=1)}
  make = functools.partial(
    _draw, steps=steps, pool=LETTERS[:letters], definitions=definitions, modulus=modulus
  )
  records, seen, misses, two_routes = [], set(), 0, False
  while len(records) < size:
    # What is drawn again, here or in `_draw`, must not change how many problems have two routes:
    # there are far fewer of them, and they repeat sooner. (The coin falls all the same, so that
    # the problems of a seed stay those that they were.)
    coin = rng.random() < rho
    two_routes = two_routes if misses else coin
    problem = make(rng, weights=weights, two_routes=two_routes)
    key = _key(problem)
    if key in seen or not in_split(key, split):
      misses += 1
      if misses == 2000:  # in a row
        raise UserError(
          f'plan_execute has fewer than {size} such problems: ask for a smaller size.'
        )
      continue
    seen.add(key)
    misses = 0
    error = _corruption(error_rng, problem, modulus) if error_rng.random() < corrupt else None
    other = problem
    while hint == 'shuffled' and other.route in (problem.route, problem.other_route):
      other = make(other_rng, weights=weights, two_routes=other_rng.random() < rho)
    kind = hint_rng.choice(TRUE) if hint == 'mixed' else hint
    record_id = f'plan_execute/{split}/{seed}/{len(records)}'
    records.append(
      {**_record(record_id, problem, other, error, kind, corrupt > 0), 'modulus': modulus}
    )
  return records


def parse(prompt: str) -> tuple[list[Definition], str]:
  """The definitions and the query of a prompt."""
  words = prompt.split()
  if len(words) % 3 != 2 or words[-2] != '?':
    raise UserError(f'A plan_execute prompt is definitions and a query, not {prompt[:60]!r}.')
  triples = [Definition(*words[i : i + 3]) for i in range(0, len(words) - 2, 3)]
  return triples, words[-1]


def score(prompt: str, completion: str, modulus: int = 10) -> Score:
  """Holds a completion against the definitions of its prompt."""
  definitions, query = parse(prompt)
  values = _evaluate(definitions, modulus)
  words = [word for word in completion.split() if not word.startswith('<|')]
  pairs = list(zip(words[0::2], words[1::2]))
  final = len(words) % 2 == 0 and bool(pairs) and pairs[-1] == (query, str(values.get(query)))
  stated: dict[str, int] = {}
  on_route, right = len(words) % 2 == 0, 0
  previous = '='
  for variable, value in pairs:
    mine = [d for d in definitions if d.variable == variable]
    on_route &= any(d.parent == previous for d in mine)
    steps = (_step(d, stated, modulus) for d in mine)
    right += value in {str(step) for step in steps if step is not None}
    if value in '0123456789' and len(value) == 1:
      stated[variable] = int(value)
    previous = variable
  return Score(final, on_route and previous == query, right / len(pairs) if pairs else 0.0)


def verify(record: Any, completion: str) -> float:
  """1.0 where the completion ends with the queried variable and its right value, else 0.0."""
  return float(score(field(record, 'prompt'), completion, field(record, 'modulus') or 10).final)


def token_kinds(record: Any, completion_words: list[str]) -> list[str]:
  """'plan' for a variable, 'execution' for a value, 'other' for the rest, the stop included."""
  del record  # the kind shows in the word itself
  kinds: dict[str, str] = {
    **dict.fromkeys(LETTERS, 'plan'),
    **dict.fromkeys('0123456789', 'execution'),
  }
  return [kinds.get(word, 'other') for word in completion_words]


def _check(size, seed, steps, definitions, letters, rho, hint, ops, modulus, zipf, corrupt):
  if size < 1 or seed < 0:
    raise UserError(f'plan_execute needs size >= 1 and seed >= 0, not {size} and {seed}.')
  if steps < 2 or not 2 * steps <= definitions <= len(LETTERS):
    raise UserError(
      f'plan_execute needs steps >= 2 and 2 * steps <= definitions <= {len(LETTERS)}, '
      f'not steps={steps} and definitions={definitions}.'
    )
  if not definitions <= letters <= len(LETTERS):
    raise UserError(
      f'plan_execute needs definitions <= letters <= {len(LETTERS)}, not definitions={definitions} '
      f'and letters={letters}.'
    )
  if not (0 <= rho <= 1 and 0 <= corrupt <= 1):
    raise UserError(f'plan_execute needs rho and corrupt between 0 and 1, not {rho} and {corrupt}.')
  if hint not in HINTS:
    raise UserError(f'plan_execute has no hint {hint!r}: choose one of {", ".join(HINTS)}.')
  if not ops or len(set(ops)) < len(ops) or not set(ops) <= set('+-*'):
    raise UserError(f"plan_execute needs ops made of '+', '-' and '*', not {ops!r}.")
  if not 3 <= modulus <= 10:
    raise UserError(f'plan_execute needs a modulus from 3 to 10, not {modulus}.')
  if not (math.isfinite(zipf) and zipf >= 0):
    raise UserError(f'plan_execute needs a finite zipf >= 0, not {zipf}.')


def _draw(
  rng: random.Random,
  steps: int,
  pool: str,
  definitions: int,
  modulus: int,
  weights: dict[str, float],
  two_routes: bool,
) -> Problem:
  """One problem; drawn again where no function closes the second route on the same value."""
  words, cumulative = list(weights), list(itertools.accumulate(weights.values()))
  while True:
    names = rng.sample(pool, definitions)
    # The chains share their first `fork` variables; with 0 each has a root of its own.
    fork = rng.randrange(steps - 1)
    chain = names[:steps]
    twin = chain[:fork] + names[steps : 2 * steps - fork]
    rest = names[2 * steps - fork :]
    query = chain[-1]
    if two_routes:
      rest = rest + [twin[-1]]
      twin[-1] = query
    edges = [(chain[0], '='), *zip(chain[1:], chain)]
    edges += [(twin[i], twin[i - 1] if i else '=') for i in range(fork, steps)]
    for variable in rest[: definitions - len(edges)]:
      parents = [v for v, _ in edges if v != query]
      edges.append((variable, rng.choice(parents)))

    values: dict[str, int] = {}
    made = []
    for variable, parent in edges:
      if parent == '=':
        function = str(rng.randrange(modulus))
        values[variable] = int(function)
      elif variable in values:
        fitting = [w for w in words if apply(w, values[parent], modulus) == values[variable]]
        if not fitting:
          break
        function = rng.choices(fitting, [weights[w] for w in fitting])[0]
      else:
        function = rng.choices(words, cum_weights=cumulative)[0]
        values[variable] = apply(function, values[parent], modulus)
      made.append(Definition(variable, parent, function))
    if len(made) < len(edges):
      continue

    # A fair coin after all else: the way of drawing leaves no trace of the reference in the prompt.
    if two_routes and rng.random() < 0.5:
      chain, twin = twin, chain
    rng.shuffle(made)
    other = tuple(twin) if two_routes else None
    return Problem(tuple(made), query, tuple(chain), other, values)


def _corruption(rng: random.Random, problem: Problem, modulus: int) -> tuple[list[str], list[int]]:
  """A completion with one error and a sensible rest, and the mask of its words."""
  words: list[str] = []
  mask: list[int] = []
  stated: dict[str, int] = {}
  where = rng.randrange(len(problem.route))
  stray = _stray(rng, problem, where) if rng.random() < 0.5 else None
  previous = '='
  for i, variable in enumerate(problem.route):
    definition = next(
      d for d in problem.definitions if d.variable == variable and d.parent == previous
    )
    value, right = _step(definition, stated, modulus), 1
    assert value is not None
    if i == where and stray:
      words += [stray, str(problem.values[stray])]
      mask += [0, 1]
    elif i == where:
      value, right = (value + rng.randrange(1, modulus)) % modulus, 0
    words += [variable, str(value)]
    mask += [1, right]
    stated[variable] = value
    previous = variable
  return words, mask


def _stray(rng: random.Random, problem: Problem, where: int) -> str | None:
  """A variable off the routes that a poor planner might name at a step, if there is one."""
  done = problem.route[:where]
  right = {*problem.route, *(problem.other_route or ())}
  # Its value can be told from what has been stated: the best guesses are children of the last step.
  lost = [d for d in problem.definitions if d.variable not in right and d.parent in ('=', *done)]
  children = [d for d in lost if d.parent == (done[-1] if done else '=')]
  return rng.choice(children or lost).variable if lost else None


def _step(definition: Definition, stated: dict[str, int], modulus: int) -> int | None:
  """The value of a definition, given the values stated so far; None where its parent has none."""
  if definition.parent == '=':
    return int(definition.function)
  if definition.parent not in stated:
    return None
  return apply(definition.function, stated[definition.parent], modulus)


def _evaluate(definitions: list[Definition], modulus: int) -> dict[str, int]:
  """The values of all variables that follow from a root."""
  values: dict[str, int] = {}
  for _ in definitions:
    for definition in definitions:
      value = _step(definition, values, modulus)
      if value is not None:
        values[definition.variable] = value
  return values


def _key(problem: Problem) -> str:
  """A problem up to the order in which its definitions are shown."""
  return ';'.join(sorted(' '.join(d) for d in problem.definitions)) + '?' + problem.query


def _record(record_id, problem, other, error, hint, masked) -> dict[str, Any]:
  steps = ' '.join(problem.route)
  answer = str(problem.values[problem.query])
  solution = ' '.join(f'{v} {problem.values[v]}' for v in problem.route)
  contexts = {
    'steps': steps,
    'none': '',
    'answer': answer,
    'answer_steps': f'{steps} {answer}',
    'full': solution,
    'shuffled': ' '.join(other.route),
    'partial': problem.route[0],
  }
  lines = [' '.join(definition) for definition in problem.definitions] + [f'? {problem.query}']
  words, mask = error or (solution.split(), [1] * (2 * len(problem.route)))
  record = {
    'id': record_id,
    'prompt': '\n'.join(lines),
    'privileged_context': contexts[hint],
    'completion': ' '.join(words),
    'answer': answer,
    'verifier': 'plan_execute',
    'route': list(problem.route),
    'other_route': list(problem.other_route) if problem.other_route else None,
  }
  if masked:
    record['completion_mask'] = mask
  return record
