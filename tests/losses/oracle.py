"""The formulas of the paper in float64 NumPy, one token at a time: slow, obvious, independent."""

import numpy as np

LN2 = np.log(2.0)


def log_softmax(z):
  z = np.asarray(z, np.float64)
  shifted = z - z.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(a, b):
  """KL(a || b) of two probability vectors."""
  return sum(x * np.log(x / y) if y > 0 else np.inf for x, y in zip(a, b) if x > 0)


def js(p, q, b=0.5):
  m = b * q + (1 - b) * p
  return b * kl(q, m) + (1 - b) * kl(p, m)


def top_ids(p, k):
  return sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]


def coarse(p, q, k, tail, chooser):
  """Both distributions on the top k of `chooser`."""
  if k >= len(p):
    return p, q
  ids = top_ids(chooser, k)
  rest = [i for i in range(len(p)) if i not in ids]
  p_K, q_K = p[ids], q[ids]
  if tail == 'renormalise':
    return p_K / p_K.sum(), q_K / q_K.sum()
  if tail == 'bucket':
    return np.append(p_K, p[rest].sum()), np.append(q_K, q[rest].sum())
  return p_K, q_K


def top_k_reverse_kl(p, q, k, tail='bucket', support='student'):
  return kl(*coarse(p, q, k, tail, p if support == 'student' else q))


def quantile(values, level):
  x = np.sort(values)
  at = level * (len(x) - 1)
  low = int(np.floor(at))
  high = min(low + 1, len(x) - 1)
  return x[low] + (at - low) * (x[high] - x[low])


def trimmed_mean(values, trim):
  values = np.asarray(values, np.float64)
  if not values.size:
    return 0.0
  return values[values <= quantile(values, 1 - trim)].mean()


def route(s, t, mask, trim=0.05, scope='batch'):
  """Regimes 0 LH, 1 LL, 2 HT, 3 HS, -1 masked; and both thresholds for each row."""
  s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
  gap, conf = np.abs(t - s), np.exp(s) + np.exp(t)
  regime = np.full(mask.shape, -1)
  thresholds = []
  for b in range(len(mask)):
    use = mask if scope == 'batch' else np.arange(len(mask))[:, None] == b
    use = use & mask
    a_bar, c_bar = trimmed_mean(gap[use], trim), trimmed_mean(conf[use], trim)
    thresholds.append((a_bar, c_bar))
    for n in np.flatnonzero(mask[b]):
      if gap[b, n] < a_bar:
        regime[b, n] = 0 if conf[b, n] >= c_bar else 1
      else:
        regime[b, n] = 2 if t[b, n] >= s[b, n] else 3
  return regime, np.array(thresholds)


def dopd(
  z_S,
  z_Sp,
  z_Tp,
  tokens,
  mask,
  *,
  k=128,
  tail='bucket',
  support='student',
  light=0.6,
  weak=0.3,
  trim=0.05,
  scope='batch',
  temperature=1.0,
  reduction='sequence',
  regime=None,
):
  """The whole loss; `regime` fixes the routing, for differences in z_S alone."""
  s, sp, tp = (log_softmax(np.asarray(z, np.float64) / temperature) for z in (z_S, z_Sp, z_Tp))
  if regime is None:
    at = np.asarray(tokens)[..., None]
    y_S, y_T = (np.take_along_axis(x, at, -1)[..., 0] for x in (sp, tp))
    regime, _ = route(y_S, y_T, mask, trim, scope)
  loss = np.zeros(mask.shape)
  for b, n in zip(*np.nonzero(mask)):
    p, u, q = np.exp(s[b, n]), np.exp(sp[b, n]), np.exp(tp[b, n])
    match regime[b, n]:
      case 0:
        loss[b, n] = light * top_k_reverse_kl(p, q, k, tail, support)
      case 1:
        loss[b, n] = weak * top_k_reverse_kl(p, u, k, tail, support)
      case 2:
        loss[b, n] = js(p, q)
      case 3:
        loss[b, n] = light * top_k_reverse_kl(p, u, k, tail, support)
  if not mask.any():
    return 0.0, loss, regime
  if reduction == 'token':
    return loss[mask].mean(), loss, regime
  rows = [loss[b][mask[b]].mean() for b in range(len(mask)) if mask[b].any()]
  return np.mean(rows), loss, regime


def gradient(f, z, step=1e-5):
  """Central differences of a scalar function, float64."""
  z = np.array(z, np.float64)
  g = np.zeros_like(z)
  for i in np.ndindex(*z.shape):
    for sign in (1, -1):
      moved = z.copy()
      moved[i] += sign * step
      g[i] += sign * f(moved) / (2 * step)
  return g
