"""Damaged copies of bytes and of JSON, the same for the same seed."""

import copy
import random

ODD = (
  *(None, True, -1, 0, 2**70, 1.5, 1e308, float('nan'), float('inf'), '', ' ', 'x', '\ud800', '\0'),
  *('9' * 400, '../..', [], [[]], [None], {}, {'': None}, {'a': {'b': []}}),
)


def of_bytes(data: bytes, rng: random.Random) -> bytes:
  """One to three cuts, flips, repeats and insertions; now and then nothing but noise."""
  if rng.random() < 0.05:
    return rng.randbytes(rng.randrange(400))
  found = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    # Heads say how the rest is read: half of the damage goes there.
    end = len(found) if rng.random() < 0.5 else min(len(found), 256)
    at = rng.randrange(end + 1)
    size = rng.choice((1, 1, 2, 4, 8, 64))
    kind = rng.randrange(6)
    if kind == 0:
      del found[at:]
    elif kind == 1 and at < len(found):
      found[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
      found[at : at + size] = rng.choice((b'\xff', b'\0', b'\x7f')) * size
    elif kind == 3:
      found[at:at] = rng.randbytes(size)
    elif kind == 4:
      del found[at : at + size]
    else:
      other = rng.randrange(len(found) + 1)
      found[at:at] = found[other : other + size]
  return bytes(found)


def of_json(value, rng: random.Random):
  """One to three nodes replaced by something odd, or taken away."""
  found = copy.deepcopy(value)
  for _ in range(rng.randint(1, 3)):
    places = list(_places(found))
    if not places:
      return rng.choice(ODD)
    parent, key = rng.choice(places)
    if rng.random() < 0.2 and isinstance(parent, dict):
      del parent[key]
    elif rng.random() < 0.1 and isinstance(parent, dict):
      parent[rng.choice(('x', '', key * 2))] = copy.deepcopy(rng.choice(ODD))
    else:
      parent[key] = copy.deepcopy(rng.choice(ODD))
  return found


def _places(node):
  if isinstance(node, dict | list):
    for key in node if isinstance(node, dict) else range(len(node)):
      yield node, key
      yield from _places(node[key])
