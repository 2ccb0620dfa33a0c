"""Hints made from worked solutions: the steps, without the results."""

import re

# Numbers of the world rather than of a solution: units of time, halves and pairs, per cent.
_CONSTANTS = {1.0, 2.0, 7.0, 12.0, 24.0, 60.0, 100.0}
_WORDS = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven')
_VALUES = {word: float(i) for i, word in enumerate(_WORDS, start=1)}
_VALUES |= {'twice': 2.0, 'double': 2.0, 'half': 2.0, 'thrice': 3.0, 'triple': 3.0, 'third': 3.0}
_VALUES |= {'quarter': 4.0, 'twelve': 12.0, 'dozen': 12.0}

_NUMBER = r'\d[\d,]*\d(?:\.\d+)?|\d+(?:\.\d+)?'
_NUMBERS = re.compile(_NUMBER)
_SIGNED = re.compile(rf'(?P<sign>-?)(?P<number>{_NUMBER})')
# What stands after an equals sign, up to the next one or the end of its sentence.
_RIGHT_SIDE = re.compile(
  rf'=\s*[^\w=]*?(?P<first>(?:{_NUMBER})(?:/\d+(?![\w.]*\s*[-+*/×÷]))?)(?P<rest>[^=]*?)(?=$|=|\.\s|\n)'
)
_OPERATION = re.compile(r'\d[^.,;=]*?(?<![A-Za-z])[-+*/x×÷](?![A-Za-z])[^.,;=]*?[\dA-Z(]')
_BULLET = re.compile(r'^\s*(?:\d+\.\s+|[-•*]\s+)')
_BLANK = '?'


def numbers_in(text: str) -> set[float]:
  """The numbers that a text gives in digits."""
  return {_value(number) for number in _NUMBERS.findall(text)}


def results_in(solution: str) -> set[float]:
  """The numbers that a worked solution arrives at: what stands alone after an equals sign."""
  return {value for line in solution.splitlines() for value in _results(line)}


def result_spans(solution: str) -> list[tuple[int, int]]:
  """Where those numbers stand in the text: (start, end) in characters, ascending."""
  spans, start = [], 0
  for line in solution.splitlines(keepends=True):
    spans += [(start + m.start('first'), start + m.end('first')) for m in _lone_results(line)]
    start += len(line)
  return spans


def steps_without_results(solution: str, problem: str, answer: str) -> str:
  """Numbered steps of a worked solution, with every result taken out.

  A number stays if the problem gives it and it is not the answer. What a step arrives at becomes
  `?`; where a later step takes it up it becomes `[step 2]`, its sign included, so that the order of
  the work stays readable. The final answer stays nowhere, not even where the problem happens to
  hold the same number. A result that equals a number of the problem is not told from it, and stays.

  Args:
    solution: one step a line; a line `#### answer` is left out.
    problem: the text that tells which numbers are given.
    answer: the final answer.
  """
  lines = [_BULLET.sub('', line).strip() for line in solution.splitlines()]
  lines = [line for line in lines if line and not line.startswith('####')]
  given = numbers_in(problem)
  # Given in another way, unless a result has the same value: in words, per cent, by the calendar.
  words = re.findall(r'[a-z]+', problem.lower())
  implied = {_VALUES[word] for word in words if word in _VALUES} | _CONSTANTS
  if '%' in problem or 'percent' in problem:
    implied |= {value / 100 for value in given}
  kept = (given | (implied - results_in('\n'.join(lines)))) - numbers_in(answer)

  steps: list[str] = []
  known: dict[float, int] = {}
  for number, line in enumerate(lines, start=1):

    def show(match: re.Match) -> str:
      value = _value(match['number'])
      before = match.string[: match.start()].rstrip()
      unary = match['sign'] and not re.search(r'[\d)\]$]$', before)
      if unary and -value in known:
        return f'[step {known[-value]}]'
      if value in kept:
        return match.group()
      step = known.get(value, known.get(-value))
      return match['sign'] + (_BLANK if step is None else f'[step {step}]')

    text, start = '', 0
    for result in _lone_results(line):
      before = _SIGNED.sub(show, line[start : result.start('first')])
      # The sign belongs to the result.
      text += re.sub(r'(=\s*\W?)-$', r'\1', before) + _BLANK
      start = result.end('first')
    steps.append(f'{number}. {text}{_SIGNED.sub(show, line[start:])}')
    for result in _lone_results(line):
      sign = -1 if line[: result.start('first')].endswith('-') else 1
      for value in {_value(part) for part in result['first'].split('/')} - numbers_in(answer):
        known.setdefault(sign * value, number)
  return '\n'.join(steps)


def _lone_results(line: str) -> list[re.Match]:
  """Right sides that are one number (or fraction) with its unit, not one more operation."""
  matches = _RIGHT_SIDE.finditer(line)
  # A fraction is no operation: only its last digits count as the number before one.
  return [m for m in matches if not _OPERATION.match(m['first'].split('/')[-1] + m['rest'])]


def _results(line: str) -> set[float]:
  return {_value(part) for m in _lone_results(line) for part in m['first'].split('/')}


def _value(number: str) -> float:
  return round(float(number.replace(',', '')), 9)
