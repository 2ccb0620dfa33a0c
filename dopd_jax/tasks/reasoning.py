"""Prompts, hints and verifiers from the procedural families of reasoning_gym.

A family suits privileged training if its items carry a worked solution: gsm_symbolic does, and that
of a chain of sums follows from its expression. For any other family name the metadata that holds
the solution (`solution=`), or ask for a hint that needs none.
"""

import functools
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from dopd_jax.errors import UserError
from dopd_jax.tasks import judge
from dopd_jax.tasks.common import field, in_split
from dopd_jax.tasks.hints import result_spans, steps_without_results
from dopd_jax.tasks.words import word_tokenizer

HINTS = ('steps', 'none', 'answer', 'answer_steps', 'full', 'shuffled', 'partial')
_NEEDS_SOLUTION = ('steps', 'answer_steps', 'full', 'shuffled', 'partial')
# reasoning_gym draws item i with seed + i: our seeds must lie further apart than a set is long.
_SEED_STRIDE = 10_000_019
_JUDGE = judge.Judge()
_SAID = re.compile(r'answer(?:\s+is\b|\s*:)\s*:?[ \t]*(.+?)\s*(?:\.\s|\.?$)', re.I | re.M)


def make_records(
  family: str,
  size: int,
  seed: int,
  *,
  hint: str = 'steps',
  solution: str | None = None,
  verifier: str = 'family',
  split: str = 'train',
  **options: Any,
) -> list[dict[str, Any]]:
  """Items of a family with hints, worked solutions as completions, and answers.

  Args:
    family: name of a reasoning_gym data set, such as 'gsm_symbolic'.
    size: number of records; no question comes twice.
    seed: sets with different seeds share no item.
    hint: what the privileged context holds: 'steps' (the worked solution without its results),
      'none', 'answer', 'answer_steps', 'full' (the worked solution), 'shuffled' (the steps of
      another item) or 'partial' (the first step).
    solution: the key of the metadata that holds the worked solution, a text or a list of steps.
    verifier: 'family', its own score, in a process with limits, some 10 ms an answer; or 'exact',
      the answer as a number or a text.
    split: 'train', 'test' or 'all'; the hash of the question decides.
    **options: of the family, as reasoning_gym names them.

  Raises:
    UserError: reasoning_gym is missing, there is no such family or option, the family carries no
      worked solution and the hint needs one, or there are too few items.
  """
  if hint not in HINTS:
    raise UserError(f'{family} has no hint {hint!r}: choose one of {", ".join(HINTS)}.')
  if verifier not in ('family', 'exact'):
    raise UserError(f'{family} has no verifier {verifier!r}: choose family or exact.')
  if size < 1 or seed < 0:
    raise UserError(f'{family} needs size >= 1 and seed >= 0, not {size} and {seed}.')
  if hint == 'shuffled' and size < 2:
    raise UserError("The hint 'shuffled' takes the steps of another item: ask for 2 or more.")
  entries = _entries(family, size, seed, split, options)
  solve = functools.partial(_solution, key=solution)
  solutions = [solve(entry) for entry in entries]
  if hint in _NEEDS_SOLUTION and not all(solutions):
    raise UserError(
      f'Items of {family} carry no worked solution: name its metadata by solution=KEY, '
      "or take hint='answer' or hint='none'."
    )
  steps = [_steps(text, entry) if text else '' for text, entry in zip(solutions, entries)]
  records = []
  for i, (entry, text) in enumerate(zip(entries, solutions)):
    contexts = {
      'steps': steps[i],
      'none': '',
      'answer': entry['answer'],
      'answer_steps': f'{steps[i]}\nThe answer is {entry["answer"]}.',
      'full': text,
      'shuffled': steps[(i + 1) % len(steps)],
      'partial': steps[i].split('\n')[0],
    }
    records.append(
      {
        'id': f'{family}/{split}/{seed}/{i}',
        'prompt': entry['question'],
        'privileged_context': contexts[hint],
        'completion': text,
        'answer': entry['answer'],
        'verifier': 'exact' if verifier == 'exact' else f'reasoning_gym:{family}',
        'metadata': entry['metadata'],
      }
    )
  return records


def tokenizer():
  """A Hugging Face tokenizer of chain_sum: one token a word, a line's end, a number up to 99.

  It knows the words of problems, solutions and every hint but `answer_steps`.
  """
  prompt = ['State', 'the', 'final', 'answer', 'to', 'following', 'arithmetic', 'problem:']
  steps = [f'{k}.' for k in range(1, 10)] + ['[step', *(f'{k}]' for k in range(1, 10)), '?']
  numbers = [str(n) for n in range(-99, 100)]
  return word_tokenizer(['\n', '=', '+', '-', '####', *steps, *numbers, *prompt])


def verify(record: Any, completion: str) -> float:
  """The family's own score of the final answer in a completion, 0 to 1; 1.0 is right.

  A number that merely holds the digits of a whole answer scores 0, where many families give a part.
  """
  family = field(record, 'verifier').removeprefix('reasoning_gym:')
  answer = field(record, 'answer')
  metadata = field(record, 'metadata')
  if not isinstance(metadata, dict):
    raise UserError(
      f'Record {field(record, "id")}: its verifier {field(record, "verifier")} needs the column '
      'metadata that the family made; keep it with the record.'
    )
  given = final_answer(completion)
  wanted = _number(answer) if isinstance(answer, str) else None
  if wanted is not None and (number := _last_number(given)) is not None:
    # A family reads the first number that it finds, and knows no thousands separators.
    given = number
    # Most give half for 14 where 4 is right, since 4 stands in it. Decimals have a tolerance.
    if '.' not in answer and answer in given and Decimal(given) != wanted:
      return 0.0
  if given == answer:
    return 1.0
  entry = {'question': field(record, 'prompt'), 'answer': answer, 'metadata': metadata}
  try:
    reward = _score(family, given, json.dumps(entry))
  except (judge.Refused, TypeError, OSError) as error:
    raise UserError(
      f'Record {field(record, "id")}: {field(record, "verifier")} cannot judge it ({error}): '
      'correct its verifier or metadata, or install reasoning_gym by pip install dopd_jax[tasks].'
    ) from None
  # Some families give 0.01 to whatever looks like an answer: that is no part of being right.
  return 0.0 if reward <= 0.01 else min(reward, 1.0)


@functools.lru_cache(maxsize=1 << 16)
def _score(family: str, given: str, entry: str) -> float:
  """By the family, in a process of its own: at every look a student says most answers again."""
  return _JUDGE.score(family, given, json.loads(entry))


def token_kinds(record: Any, completion_pieces: list[str]) -> list[str]:
  """'execution' for what a step arrives at, 'plan' for the rest of it, 'other' outside of steps.

  Outside are blanks and the line `#### answer`, which repeats what the last step arrived at.

  Args:
    record: of any family.
    completion_pieces: tokens as text, blanks included: joined they are the completion. One that
      holds a part of a result is execution.
  """
  del record  # a result stands alone after an equals sign
  text = ''.join(completion_pieces)
  spans, kinds, start = result_spans(text), [], 0
  steps_end = match.start() if (match := re.search(r'^\s*####', text, re.M)) else len(text)
  for piece in completion_pieces:
    end = start + len(piece)
    arrives = any(first < end and start < last for first, last in spans)
    step = start < steps_end and piece.strip()
    kinds.append('execution' if arrives else 'plan' if step else 'other')
    start = end
  return kinds


def exact(record: Any, completion: str) -> float:
  """1.0 where the final answer is the record's, as numbers or as text without case and spacing."""
  answer = field(record, 'answer')
  if answer is None:
    raise UserError(f'Record {field(record, "id")}: the verifier exact needs an answer.')
  given = final_answer(completion)
  wanted = _number(answer)
  if wanted is not None:
    number = _last_number(given)
    return float(number is not None and Decimal(number) == wanted)
  return float(_folded(given) == _folded(answer))


def final_answer(completion: str) -> str:
  r"""What a completion gives as its answer.

  The last <answer>...</answer>, `#### ...`, \boxed{...} or `the answer is ...`, in this order of
  preference; else the last line that is not blank.
  """
  tagged = re.findall(r'<answer>(.*?)</answer>', completion, re.DOTALL)
  if tagged:
    return tagged[-1].strip()
  hashes = re.findall(r'^\s*####(.*)$', completion, re.MULTILINE)
  if hashes:
    return hashes[-1].strip()
  boxed = _boxed(completion)
  if boxed is not None:
    return boxed.strip()
  said = _SAID.findall(completion)
  if said:
    return said[-1].strip(' *')
  lines = [line.strip() for line in completion.splitlines() if line.strip()]
  return lines[-1] if lines else ''


def _entries(family, size, seed, split, options) -> list[dict[str, Any]]:
  """The first `size` items of the split; draws more until there are enough."""
  in_split('', split)
  wanted = size if split == 'all' else 2 * size + 64
  for _ in range(8):
    dataset = _dataset(family, size=wanted, seed=seed * _SEED_STRIDE, **options)
    found: dict[str, dict[str, Any]] = {}
    for entry in dataset:
      if len(found) == size:
        break
      question = entry['question']
      if question not in found and in_split(question, split):
        found[question] = {
          'question': question,
          'answer': '' if entry['answer'] is None else str(entry['answer']),
          'metadata': _as_json(entry['metadata']),
        }
    if len(found) == size:
      return list(found.values())
    wanted *= 2
  raise UserError(f'{family} has fewer than {size} such items: ask for a smaller size.')


def _dataset(family: str, **options: Any):
  try:
    import reasoning_gym
  except ImportError:
    raise UserError(
      'This task needs reasoning_gym: install it by pip install dopd_jax[tasks].'
    ) from None
  try:
    return reasoning_gym.create_dataset(family, **options)
  except (ValueError, TypeError, AssertionError) as error:
    reason = ' '.join(str(error).split())
    raise UserError(f'reasoning_gym cannot make {family!r} with {options}: {reason}.') from None


def _solution(entry: dict[str, Any], key: str | None) -> str | None:
  metadata = entry['metadata']
  family = metadata.get('source_dataset', '')
  if key is not None:
    text = metadata.get(key)
  elif family in _FROM_METADATA:
    text = _FROM_METADATA[family](metadata)
  else:
    text = metadata.get('answer_cot')
  if isinstance(text, list) and all(isinstance(step, str) for step in text):
    text = '\n'.join(text)
  return text if isinstance(text, str) and text.strip() else None


def _chain_of_sums(metadata: dict[str, Any]) -> str:
  """'4 + 3 - 2' as one sum a line, and its result after ####."""
  words = metadata['expression'].split()
  total, lines = Decimal(words[0]), []
  for operator, term in zip(words[1::2], words[2::2]):
    following = total + Decimal(term) if operator == '+' else total - Decimal(term)
    lines.append(f'{total} {operator} {term} = {following}')
    total = following
  return '\n'.join([*lines, f'#### {total}'])


def _steps(solution: str, entry: dict[str, Any]) -> str:
  if entry['metadata'].get('source_dataset') not in _FROM_METADATA:
    return steps_without_results(solution, entry['question'], entry['answer'])
  # Of the expression alone: a result may equal one of its numbers.
  first, *rest = entry['metadata']['expression'].split()
  lines = [
    f'{k}. {first if k == 1 else f"[step {k - 1}]"} {operator} {term} = ?'
    for k, (operator, term) in enumerate(zip(rest[::2], rest[1::2]), start=1)
  ]
  return '\n'.join(lines)


_FROM_METADATA: dict[str, Callable[[dict[str, Any]], str]] = {
  'chain_sum': _chain_of_sums,
  'decimal_chain_sum': _chain_of_sums,
}


def _as_json(value: Any) -> Any:
  """Metadata as it comes back from a file: records of a task may be written and read again."""
  return json.loads(json.dumps(value, default=lambda item: getattr(item, 'tolist', item.__str__)()))


def _number(text: str) -> Decimal | None:
  text = text.strip().strip('$€£').rstrip('.%').replace(',', '')
  return Decimal(text) if re.fullmatch(r'-?\d+(\.\d+)?', text) else None


def _last_number(text: str) -> str | None:
  numbers = re.findall(r'-?\d[\d,]*\d(?:\.\d+)?|-?\d+(?:\.\d+)?', text)
  return numbers[-1].replace(',', '') if numbers else None


def _folded(text: str) -> str:
  return ' '.join(text.casefold().split()).rstrip('.')


def _boxed(text: str) -> str | None:
  start = text.rfind(r'\boxed{')
  if start < 0:
    return None
  depth, begin = 0, start + len(r'\boxed{')
  for i in range(begin - 1, len(text)):
    depth += {'{': 1, '}': -1}.get(text[i], 0)
    if depth == 0:
      return text[begin:i]
  return text[begin:]
