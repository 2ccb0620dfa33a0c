"""A report of `compile_check` for a person."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dopd_jax.pods.topologies import GIB

_SIZES = {
  'arguments': 'args',
  'temporaries': 'temps',
  'beside': 'beside',
  'needs': 'needs',
  'peak': 'peak',
}
_NOTE = (
  'needs: what a device must have, with results and code; peak: what is in use at one time, '
  'without the gaps between buffers. beside: of state and given models, what the program does not '
  'read. moved: what a device gets from collectives, loops by their passes (at most), tiles of the '
  "head once. TFLOP: a device's share of the matmuls, counted from shapes at full length."
)


def show(report: Mapping[str, Any], console: Console) -> None:
  """Prints a report of `compile_check.check`."""
  limit = report['memory']
  axes = ' x '.join(f'{axis} {size}' for axis, size in report['mesh'].items())
  held = ', '.join(f'{name} {_gib(n)}' for name, n in report['held'].items())
  if report['parked']:
    held += f'; {_gib(report["parked"])} more while the teacher scores'
  tokens = ', '.join(f'{name} {n:,}' for name, n in report['tokens'].items())
  for line in (
    f'{report["teacher"] or "no teacher"} -> {report["student"]}, {report["objective"]}: '
    f'{report["rows"]} rows, micro-batch {report["microbatch"]}; tokens: {tokens}',
    f'{report["topology"]}: {report["devices"]} x {report["chip"]}'
    f'{f" of {_gib(limit)} GiB" if limit else ""}; mesh {axes}',
    f'GiB a device: {held}',
  ):
    console.print(line, highlight=False, soft_wrap=True)

  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
  table.add_column('')
  for head in (*_SIZES.values(), 'moved', 'TFLOP', 's', ''):
    table.add_column(head, justify='right')
  for name, p in report['programs'].items():
    sizes = [_gib(p.get(size)) for size in _SIZES]
    moved = sum(c['bytes'] for c in p.get('collectives', ()))
    table.add_row(
      name,
      *sizes,
      _gib(moved),
      f'{p["flops"] / 1e12:,.1f}',
      f'{p["seconds"]:.0f}',
      'fits' if p['fits'] else 'does not fit',
    )
  console.print(table)
  for name, p in report['programs'].items():
    lines = [p['error']] if 'error' in p else []
    for kind, (runs, moved) in by_kind(p.get('collectives', ())).items():
      lines.append(f'{kind} {runs:,} times, {_gib(moved)} GiB')
    for x in p['largest'][:4]:
      lines.append(f'{x.get("size") or _gib(x["bytes"]) + " GiB"} {x["array"]} {x["source"][-60:]}')
    lines += [f'a collective spans the vocabulary: {wide}' for wide in p.get('wide', ())]
    for line in lines:
      console.print(f'{name}: {line}', highlight=False, soft_wrap=True, markup=False)
  console.print(_NOTE, style='dim', soft_wrap=True)


def by_kind(collectives: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
  """How often each kind of collective runs, and its bytes."""
  found: dict[str, tuple[int, int]] = {}
  for c in collectives:
    runs, moved = found.get(c['kind'], (0, 0))
    found[c['kind']] = runs + c['times'], moved + c['bytes']
  return found


def _gib(size: int | None) -> str:
  return '' if size is None else f'{size / GIB:.3g}'
