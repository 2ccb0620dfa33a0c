"""Every method in float64 NumPy: its equations, one token at a time, gradients derived by hand.

A method is a plan: entries (row, position, coefficient, term). A term maps the student's
log-probabilities s [V] of that token to its value and to u_j = d value / d s_j; advantages,
weights, supports and regimes are numbers inside the plan. loss = sum coefficient * value, and
through the softmax d value / d z = u - p sum(u).

A method called with the logits `z` (view name -> [B, N, V]) gives (loss, d loss / d z['S']).
`method.plan` takes log-probabilities instead and gives the plan, for differences in z['S'] with
all else held fixed.
"""

import functools
import math

import numpy as np

from tests.losses.oracle import js, log_softmax, route, top_ids, trimmed_mean


def method(plan):
  @functools.wraps(plan)
  def loss_and_gradient(z, *args, **settings):
    lp = {view: log_softmax(logits) for view, logits in z.items()}
    return evaluate(plan(lp, *args, **settings), z['S'])

  loss_and_gradient.plan = plan
  return loss_and_gradient


def evaluate(plan, z_S):
  s = log_softmax(z_S)
  loss, grad = 0.0, np.zeros(s.shape)
  for b, n, coefficient, term in plan:
    value, u = term(s[b, n])
    loss += coefficient * value
    grad[b, n] += coefficient * (u - np.exp(s[b, n]) * u.sum())
  return loss, grad


# Terms.


def log_sum_exp(x):
  return x.max() + np.log(np.exp(x - x.max()).sum())


def divergence(s, q, weight, ids=None, tail='truncate'):
  """JSD_b = b KL(Q||m) + (1-b) KL(P||m), m = b Q + (1-b) P; b = 0: KL(Q||P), b = 1: KL(P||Q).

  P and Q are the student and the target on the classes: each id alone, and the rest together
  when the tail is a bucket. All in logs: `s`, `q` [V]; `ids` None is the full vocabulary.
  """
  ids = range(len(s)) if ids is None else ids
  rest = [v for v in range(len(s)) if v not in ids]
  classes = [[v] for v in ids] + ([rest] if tail == 'bucket' and rest else [])
  mass = np.array([log_sum_exp(s[c]) for c in classes])
  P, Q = mass, np.array([log_sum_exp(q[c]) for c in classes])
  if tail == 'renormalise':
    P, Q = P - log_sum_exp(P), Q - log_sum_exp(Q)

  if weight == 0:  # h = d value / d log P
    value, h = np.exp(Q) @ (Q - P), -np.exp(Q)
  elif weight == 1:
    value, h = np.exp(P) @ (P - Q), np.exp(P) * (P - Q + 1)
  else:
    m = np.logaddexp(math.log(weight) + Q, math.log(1 - weight) + P)
    value = weight * np.exp(Q) @ (Q - m) + (1 - weight) * np.exp(P) @ (P - m)
    h = (1 - weight) * np.exp(P) * (P - m)
  if tail == 'renormalise':
    h = h - np.exp(P) * h.sum()

  u = np.zeros(len(s))
  for c, h_c, mass_c in zip(classes, h, mass):
    u[c] = h_c * np.exp(s[c] - mass_c)
  return value, u


def surrogate(s, y, old, advantage, clip_low=None, clip_high=None):
  """-min(r A, clip(r, 1 - low, 1 + high) A), r = S(y) / S_old(y)."""
  ratio = np.exp(s[y] - old)
  low = -np.inf if clip_low is None else 1 - clip_low
  high = np.inf if clip_high is None else 1 + clip_high
  free, clipped = ratio * advantage, min(max(ratio, low), high) * advantage
  u = np.zeros(len(s))
  if free <= clipped:
    u[y] = -ratio * advantage
  return -min(free, clipped), u


def clipped_forward_kl(s, q, clip):
  """sum_v min(F_v log(F_v / S_v), clip)."""
  parts = np.exp(q) * (q - s)
  return np.minimum(parts, clip).sum(), np.where(parts < clip, -np.exp(q), 0.0)


def full_reverse_kl(q):
  return functools.partial(divergence, q=q, weight=1)


# Means and selections.


def coefficients(mask, reduction):
  """[B, N]: what a token's term counts in the mean."""
  mask = np.asarray(mask, bool)
  if reduction == 'token':
    return mask / max(mask.sum(), 1)
  lengths = mask.sum(1, keepdims=True)
  return mask / np.maximum(lengths, 1) / max((lengths > 0).sum(), 1)


def mean_plan(mask, reduction, term):
  """The mean of term(b, n) over the mask."""
  weights = coefficients(mask, reduction)
  return [(b, n, weights[b, n], term(b, n)) for b, n in np.argwhere(mask)]


def at(lp, tokens):
  """The log-probabilities [B, N] of the tokens."""
  return np.take_along_axis(lp, np.asarray(tokens)[..., None], -1)[..., 0]


def round_half_up(x):
  return math.floor(x + 0.5)


def keep_largest(score, mask, count):
  """The mask's `count` tokens of the largest score; among equals the earlier in row-major order."""
  order = sorted(np.argwhere(mask).tolist(), key=lambda bn: (-score[bn[0], bn[1]], bn))
  kept = np.zeros(mask.shape, bool)
  for b, n in order[:count]:
    kept[b, n] = True
  return kept


# Teachers.


@method
def opd(lp, tokens, mask, divergence='reverse_kl', region='top_k', k=128, tail='bucket',
        reduction='sequence', source='T'):  # fmt: skip
  weight = {'forward_kl': 0, 'js': 0.5, 'reverse_kl': 1}[divergence]
  k = lp['S'].shape[-1] if region == 'full' else k
  return mean_plan(mask, reduction, on_student_top_k(lp, source, weight, k, tail))


def on_student_top_k(lp, source, weight, k, tail):
  return lambda b, n: functools.partial(
    divergence, q=lp[source][b, n], weight=weight, ids=top_ids(lp['S'][b, n], k), tail=tail
  )


@method
def thinking_machines(lp, tokens, mask, old_logp, coefficient=1.0, reduction='sequence'):
  advantage = -coefficient * (old_logp - at(lp['T'], tokens))
  return mean_plan(mask, reduction, policy_gradient(tokens, old_logp, advantage))


def policy_gradient(tokens, old_logp, advantage, clip_low=None, clip_high=None):
  return lambda b, n: functools.partial(
    surrogate,
    y=tokens[b, n],
    old=old_logp[b, n],
    advantage=advantage[b, n],
    clip_low=clip_low,
    clip_high=clip_high,
  )


@method
def gkd(lp, tokens, mask, weight=0.5, reduction='sequence'):
  return mean_plan(
    mask, reduction, lambda b, n: functools.partial(divergence, q=lp['T'][b, n], weight=weight)
  )


@method
def opcd(lp, tokens, mask, k=256, tail='truncate', reduction='sequence'):
  return mean_plan(mask, reduction, on_student_top_k(lp, 'Tp', 1, k, tail))


@method
def exopd(lp, tokens, mask, old_logp, extrapolation=1.25, clip_low=None, clip_high=None,
          reduction='sequence'):  # fmt: skip
  t, r = at(lp['T'], tokens), at(lp['R'], tokens)
  advantage = (t - old_logp) + (extrapolation - 1) * (t - r)
  term = policy_gradient(tokens, old_logp, advantage, clip_low, clip_high)
  return mean_plan(mask, reduction, term)


@method
def exopd_full(lp, tokens, mask, extrapolation=1.25, reduction='sequence'):
  target = log_softmax(extrapolation * lp['T'] + (1 - extrapolation) * lp['R'])
  return mean_plan(mask, reduction, lambda b, n: full_reverse_kl(target[b, n]))


@method
def eopd(lp, tokens, mask, old_logp, threshold=0.8, alpha=1.0, k=16, clip_low=None,
         clip_high=None, reduction='sequence'):  # fmt: skip
  advantage = at(lp['T'], tokens) - old_logp
  plan = mean_plan(
    mask, reduction, policy_gradient(tokens, old_logp, advantage, clip_low, clip_high)
  )
  weights = coefficients(mask, reduction)
  for b, n in np.argwhere(mask):
    t = lp['T'][b, n]
    if -(np.exp(t) @ t) > threshold:
      term = functools.partial(divergence, q=t, weight=0, ids=top_ids(t, k), tail='truncate')
      plan.append((b, n, alpha * weights[b, n], term))
  return plan


@method
def uni_opd(lp, tokens, mask, old_logp, reward, samples, margin=0.4, direction='both', mode='mean',
            clip_low=None, clip_high=None, outlier=10.0, reduction='sequence'):  # fmt: skip
  advantage = at(lp['T'], tokens) - old_logp
  mask = mask & (np.abs(advantage) < outlier)
  shifted = advantage.copy()
  for start in range(0, len(mask), samples):
    rows = [b for b in range(start, start + samples) if mask[b].any()]
    g = {b: advantage[b][mask[b]].mean() for b in rows}
    correct = [b for b in rows if reward[b] == 1]
    wrong = [b for b in rows if reward[b] == 0]
    if not correct or not wrong:
      continue
    if mode == 'mean':
      gap = np.mean([g[b] for b in correct]) - np.mean([g[b] for b in wrong])
    else:
      gap = min(g[b] for b in correct) - max(g[b] for b in wrong)
    if gap < margin:
      up, down = {'both': (0.5, 0.5), 'correct_up': (1, 0), 'incorrect_down': (0, 1)}[direction]
      shifted[correct] += up * (margin - gap)
      shifted[wrong] -= down * (margin - gap)
  term = policy_gradient(tokens, old_logp, shifted, clip_low, clip_high)
  return mean_plan(mask, reduction, term)


# The student as its own teacher.


@method
def opsd(lp, tokens, mask, clip=0.05, reduction='sequence'):
  return mean_plan(
    mask, reduction, lambda b, n: functools.partial(clipped_forward_kl, q=lp['F'][b, n], clip=clip)
  )


@method
def sdft(lp, tokens, mask, k=128, tail='bucket', reduction='sequence'):
  return mean_plan(mask, reduction, on_student_top_k(lp, 'F', 1, k, tail))


@method
def vision_opd(lp, tokens, mask, old_logp, weight=0.5, k=100, ratio_cap=2.0, reduction='sequence'):
  ratio = np.minimum(np.exp(at(lp['S'], tokens) - old_logp), ratio_cap)
  plan = mean_plan(mask, reduction, on_student_top_k(lp, 'F', weight, k, 'bucket'))
  return [(b, n, ratio[b, n] * coefficient, term) for b, n, coefficient, term in plan]


@method
def sdpo(lp, tokens, mask, old_logp, has_hint, weight=0.5, k=100, ratio_cap=2.0,
         reduction='sequence'):  # fmt: skip
  hinted = mask & np.asarray(has_hint, bool)[:, None]
  return vision_opd.plan(lp, tokens, hinted, old_logp, weight, k, ratio_cap, reduction)


# Selections of tokens.


@method
def tip(lp, tokens, mask, share=0.5, reduction='sequence'):
  s, t = lp['S'], lp['T']

  def min_max(x):
    low, high = (x[mask].min(), x[mask].max()) if mask.any() else (0.0, 0.0)
    return (x - low) / (high - low) if high > low else np.zeros(x.shape)

  h = min_max(-(np.exp(s) * s).sum(-1))
  d = min_max((np.exp(s) * (s - t)).sum(-1))
  kept = keep_largest(h + d - h * d, mask, max(round_half_up(share * mask.sum()), 1))
  return mean_plan(kept, reduction, lambda b, n: full_reverse_kl(t[b, n]))


@method
def drop_by_gap(lp, tokens, mask, which='largest', share=0.2, reduction='sequence'):
  gap = np.abs(at(lp['Tp'], tokens) - at(lp['Sp'], tokens))
  score = {'largest': -gap, 'smallest': gap}[which]
  kept = keep_largest(score, mask, max(round_half_up((1 - share) * mask.sum()), 1))
  return mean_plan(kept, reduction, lambda b, n: full_reverse_kl(lp['T'][b, n]))


def va_rollout_weights(abar, temperature=1.0):
  """softmax(z / temperature) of the population z-scores; [.045, .03, .02, .01] -> .656 .206 ..."""
  abar = np.asarray(abar, np.float64)
  same = abar.max() == abar.min()  # a std of equal numbers may round to something above 0
  z = np.zeros(len(abar)) if same else (abar - abar.mean()) / abar.std()
  return np.exp(log_softmax(z / temperature))


@method
def va_opd(lp, tokens, mask, samples, temperature=1.0, top_share=0.2, mix=0.5, reduction=None):
  """`reduction` changes nothing: the method has means of its own."""
  a = np.maximum(at(lp['T'], tokens) - at(lp['Td'], tokens), 0)
  groups = []
  for start in range(0, len(mask), samples):
    rows = [b for b in range(start, start + samples) if mask[b].any()]
    if rows:
      groups.append(rows)
  plan = []
  for rows in groups:
    rollout_weights = va_rollout_weights([a[b][mask[b]].mean() for b in rows], temperature)
    for b, w in zip(rows, rollout_weights):
      length = mask[b].sum()
      count = min(max(round_half_up(top_share * length), 1), length)
      own = mask & (np.arange(len(mask)) == b)[:, None]
      visual = keep_largest(a, own, count)
      for part, portion in ((visual, mix), (own & ~visual, 1 - mix)):
        for _, n in np.argwhere(part):
          coefficient = w * portion / part.sum() / len(groups)
          plan.append((b, n, coefficient, full_reverse_kl(lp['T'][b, n])))
  return plan


@method
def dopd(lp, tokens, mask, k=128, beta_light=0.6, beta_weak=0.3, trim=0.05, reduction='sequence'):
  regime, _ = route(at(lp['Sp'], tokens), at(lp['Tp'], tokens), mask, trim)
  return of_regimes(lp, mask, regime, k, reduction, beta_light, beta_weak)


def of_regimes(lp, mask, regime, k, reduction, beta_light=0.6, beta_weak=0.3):
  """DOPD's four losses on regimes that are given."""
  by_teacher = on_student_top_k(lp, 'Tp', 1, k, 'bucket')
  by_itself = on_student_top_k(lp, 'Sp', 1, k, 'bucket')
  js = lambda b, n: functools.partial(divergence, q=lp['Tp'][b, n], weight=0.5)
  strength = (beta_light, beta_weak, 1.0, beta_light)  # LH, LL, HT, HS
  term = (by_teacher, by_itself, js, by_itself)
  weights = coefficients(mask, reduction)
  return [
    (b, n, strength[regime[b, n]] * weights[b, n], term[regime[b, n]](b, n))
    for b, n in np.argwhere(mask)
  ]


def bars(values, mask, trim, scope):
  """[B, N]: the trimmed mean that a token is held against."""
  rows = [mask[b : b + 1] if scope == 'sequence' else mask for b in range(len(mask))]
  taken = [values[b : b + 1] if scope == 'sequence' else values for b in range(len(mask))]
  each = [trimmed_mean(v[m], trim) for v, m in zip(taken, rows)]
  return np.repeat(np.array(each)[:, None], mask.shape[1], 1)


@method
def dopd_distributional(lp, tokens, mask, k=128, trim=0.05, reduction='sequence', scope='batch'):
  del tokens
  entropy = {name: -(np.exp(lp[name]) * lp[name]).sum(-1) for name in ('Sp', 'Tp')}
  gap = np.array([[js(np.exp(a), np.exp(b)) for a, b in zip(*x)] for x in zip(lp['Sp'], lp['Tp'])])
  confidence = -(entropy['Sp'] + entropy['Tp'])
  A, C = (bars(x, mask, trim, scope) for x in (gap, confidence))
  regime = np.full(mask.shape, -1)
  for i in zip(*np.nonzero(mask)):
    if gap[i] < A[i]:
      regime[i] = 0 if confidence[i] >= C[i] else 1
    else:
      regime[i] = 2 if entropy['Tp'][i] <= entropy['Sp'][i] else 3
  return of_regimes(lp, mask, regime, k, reduction)


@method
def dopd_signed(lp, tokens, mask, k=128, trim=0.05, reduction='sequence', scope='batch'):
  s, t = at(lp['Sp'], tokens), at(lp['Tp'], tokens)
  A = {
    ahead: bars(np.abs(t - s), mask & ((t >= s) == ahead), trim, scope) for ahead in (True, False)
  }
  C = bars(np.exp(s) + np.exp(t), mask, trim, scope)
  regime = np.full(mask.shape, -1)
  for i in zip(*np.nonzero(mask)):
    ahead = t[i] >= s[i]
    if abs(t[i] - s[i]) < A[ahead][i]:
      regime[i] = 0 if np.exp(s[i]) + np.exp(t[i]) >= C[i] else 1
    else:
      regime[i] = 2 if ahead else 3
  return of_regimes(lp, mask, regime, k, reduction)


@method
def hint_routing(lp, tokens, mask, signal='student', levels=2, mixture=0.5, weight=0.5, trim=0.05,
                 reduction='sequence', scope='batch', learned=()):  # fmt: skip
  nearest = np.vectorize(lambda w: round_half_up(w * (levels - 1)) / (levels - 1))
  if signal == 'none':
    trust = np.full(mask.shape, mixture)
  elif signal == 'learned':
    trust = np.zeros(mask.shape)
    for b, n in np.argwhere(mask):
      S, Sp, T, Tp = (lp[view][b, n] for view in ('S', 'Sp', 'T', 'Tp'))
      y = tokens[b, n]
      told = [js(np.exp(Sp), np.exp(S)), js(np.exp(Tp), np.exp(T)), abs(Tp[y] - Sp[y])]
      trust[b, n] = 1 / (1 + np.exp(np.dot(learned, [1, *told])))
    trust = nearest(trust)
  else:
    hinted, plain = {'student': ('Sp', 'S'), 'teacher': ('Tp', 'T')}[signal]
    told = np.zeros(mask.shape)
    for i in zip(*np.nonzero(mask)):
      told[i] = js(np.exp(lp[hinted][i]), np.exp(lp[plain][i]))
    exact = 1 / (1 + told / np.maximum(bars(told, mask, trim, scope), 1e-300))
    trust = nearest(exact)
  weights = coefficients(mask, reduction)
  return [
    (b, n, w * weights[b, n], functools.partial(divergence, q=lp[source][b, n], weight=weight))
    for b, n in np.argwhere(mask)
    for source, w in (('Tp', trust[b, n]), ('T', 1 - trust[b, n]))
  ]
