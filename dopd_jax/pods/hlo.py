"""What a compiled program's text says: its collectives and their bytes, and its largest arrays.

XLA's text names computations; a loop's body is one, and runs as often as the loop does. Where the
bound of a loop is a number, it is found, and a loop that may also end sooner counts as if it never
did. Where the bound is computed (tiles of rows that carry loss), the body counts once.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

_COLLECTIVES = (
  'all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute'
)
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|'
  r'called_computations)=(\{[^}]*\}|%[\w.\-]+)'
)


class Array(NamedTuple):
  """An array on one device."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Without the padding of its layout."""
    bits = {'pred': 8}.get(self.dtype) or int(re.sub(r'^\D+|e\w+$', '', self.dtype))
    return math.prod(self.shape) * bits // 8

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.shape))}]'


class Collective(NamedTuple):
  """A collective; its arrays are what one device gets from it, each time it runs."""

  kind: str
  arrays: tuple[Array, ...]
  times: int
  source: str  # where in the traced program
  conditional: str = ''  # the outermost one around it
  branch: str = ''  # in which of its branches

  @property
  def bytes(self) -> int:
    """Of all times it runs."""
    return self.times * sum(a.bytes for a in self.arrays)


class Large(NamedTuple):
  """An array that one instruction makes."""

  array: Array
  source: str


class _Instruction(NamedTuple):
  kind: str
  result: str
  rest: str  # operands and attributes


class Program:
  """A compiled program, read from `compiled.as_text()`."""

  def __init__(self, text: str):
    self._computations: dict[str, dict[str, _Instruction]] = {}
    self._callers: dict[str, list[tuple[str, str]]] = {}  # of a computation: (where, instruction)
    self._entry, here = '', ''
    for line in text.splitlines():
      if head := _HEAD.match(line):
        here = head[2]
        self._computations[here] = {}
        self._entry = here if head[1] else self._entry
      elif found := _LINE.match(line):
        name, result, kind, rest = found.groups()
        self._computations[here][name] = _Instruction(kind, result, rest)
        for group in _CALLED.findall(rest):
          for callee in re.findall(r'[\w.\-]+', group):
            self._callers.setdefault(callee, []).append((here, name))

  def collectives(self) -> list[Collective]:
    """Every collective once, though a TPU's program may start and finish it in many fusions.

    Some of these may be in a loop that it runs beside: it runs as often as its start does.
    """
    found: dict[str, Collective] = {}
    for where, name, i in self._instructions():
      kind = i.kind.removesuffix('-start')
      if not re.fullmatch(_COLLECTIVES, kind):
        continue
      arrays = _arrays(i.result)
      if i.kind.endswith('-start') or kind == 'collective-permute':
        arrays = arrays[len(arrays) // 2 :] if len(arrays) > 1 else arrays  # behind the operands
      arrays = tuple(a for a in arrays if a.shape) or tuple(arrays[:1])
      channel = re.search(r'channel_id=(\d+)', i.rest)
      made = Collective(kind, arrays, self._times(where), _source(i), *self._branch(where))
      key = channel[1] if channel else f'{where}/{name}'
      rank = lambda c: (-c.times, c.bytes)
      if key not in found or rank(made) > rank(found[key]):
        found[key] = made
    return sorted(found.values(), key=lambda c: -c.bytes)

  @staticmethod
  def heaviest(collectives: Sequence[Collective]) -> list[Collective]:
    """Of every conditional the collectives of the branch that moves most; all that are outside."""
    moved: dict[str, dict[str, int]] = {}
    for c in collectives:
      branches = moved.setdefault(c.conditional, {})
      branches[c.branch] = branches.get(c.branch, 0) + c.bytes
    most = {conditional: max(by, key=lambda b: by[b]) for conditional, by in moved.items()}
    return [c for c in collectives if c.branch == most[c.conditional]]

  def _branch(self, computation: str) -> tuple[str, str]:
    """The outermost conditional around a computation and the branch that it is in, or ''."""
    result = '', ''
    while computation in self._callers:
      where, name = self._callers[computation][0]
      if self._computations[where][name].kind == 'conditional':
        result = f'{where}/{name}', computation
      computation = where
    return result

  def largest(self, count: int) -> list[Large]:
    """The largest arrays that are made outside of fusions, each shape once."""
    found: dict[Array, Large] = {}
    fused = {callee for callee in self._callers if self._is_fused(callee)}
    passed_on = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'constant')
    for where, _, i in self._instructions():
      if where in fused or i.kind in passed_on:
        continue
      for array in _arrays(i.result):
        found.setdefault(array, Large(array, _source(i)))
    return sorted(found.values(), key=lambda x: -x.array.bytes)[:count]

  def _instructions(self):
    for where, instructions in self._computations.items():
      for name, i in instructions.items():
        yield where, name, i

  def _is_fused(self, computation: str) -> bool:
    callers = (self._computations[w][n].kind for w, n in self._callers[computation])
    return any(kind in ('fusion', 'reduce', 'sort', 'scatter', 'map') for kind in callers)

  @functools.cache  # noqa: B019 (programs are few)
  def _times(self, computation: str) -> int:
    """How often a computation runs."""
    if computation == self._entry or computation not in self._callers:
      return 1
    times = 0
    for where, name in self._callers[computation]:
      i = self._computations[where][name]
      inside = i.kind == 'while' and f'body=%{computation}' in i.rest
      times = max(times, self._times(where) * (self._trips(where, i) if inside else 1))
    return times

  def _trips(self, where: str, loop: _Instruction) -> int:
    """The most passes of a loop; 1 where they are not known."""
    if known := re.search(r'known_trip_count[^\d}]*(\d+)', loop.rest):
      return int(known[1])
    named = re.search(r'condition=%([\w.\-]+)', loop.rest)
    condition = self._computations.get(named[1], {}) if named else {}
    bounds = []
    for i in condition.values():
      if i.kind == 'compare':
        for operand in _operands(i):
          bounds.append(self._number(named[1] if named else '', operand, where, loop))
    return max([b for b in bounds if b], default=1)

  def _number(self, where: str, name: str, outer: str, loop: _Instruction | None) -> int | None:
    """The value of a scalar, where it is a constant, maybe one that is carried into a loop."""
    i = self._computations[where].get(name)
    if i is None:
      return None
    if i.kind == 'constant':
      number = re.match(r'(\d+)\)', i.rest)
      return int(number[1]) if number else None
    if i.kind in ('copy', 'bitcast', 'convert'):
      return self._number(where, _operands(i)[0], outer, loop)
    index = re.search(r'index=(\d+)', i.rest)
    if i.kind != 'get-tuple-element' or index is None:
      return None
    of = self._computations[where].get(_operands(i)[0])
    if of is None or of.kind != 'parameter' or loop is None:
      return None
    start = self._computations[outer].get(_operands(loop)[0])
    if start is None or start.kind != 'tuple':
      return None
    # What enters the loop may itself be carried into one around it.
    around = [
      (w, self._computations[w][n])
      for w, n in self._callers.get(outer, ())
      if self._computations[w][n].kind == 'while'
    ]
    further = around[0] if around else ('', None)
    return self._number(outer, _operands(start)[int(index[1])], *further)


def _operands(i: _Instruction) -> list[str]:
  return re.findall(r'%([\w.\-]+)', i.rest.split('), ')[0])


def _arrays(result: str) -> list[Array]:
  return [
    Array(dtype, tuple(int(n) for n in dims.split(',') if n))
    for dtype, dims in _ARRAY.findall(result)
  ]


def _source(i: _Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', i.rest)
  return found[1] if found else ''
