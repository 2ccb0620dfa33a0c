"""Every method's loss and gradient against a float64 oracle written from its equation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopd_jax import losses, objectives
from dopd_jax.errors import UserError
from dopd_jax.objectives import va_opd
from tests.objectives import oracles

B, N, V, M = 8, 6, 13, 4  # two prompts with four completions each
LENGTHS = np.array([6, 3, 0, 5, 1, 6, 4, 2])


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  names = ('S', 'T', 'Tp', 'Sp', 'F', 'R', 'Td')
  z = {name: 2.0 * rng.normal(size=(B, N, V)) for name in names}
  tokens = rng.integers(0, V, (B, N))
  mask = np.arange(N) < LENGTHS[:, None]
  log_S = z['S'] - np.log(np.exp(z['S']).sum(-1, keepdims=True))
  here = np.take_along_axis(log_S, tokens[..., None], -1)[..., 0]
  old = here + 0.3 * rng.normal(size=here.shape)  # the student has moved on since it sampled
  reward = np.array([1, 0, 1, 0, 0, 0, 1, 1.0])
  return z, tokens, mask, old, reward


def ours(settings, names, seed=0, mask=None, **extra):
  """(loss, gradient, plan) of a built objective; `names`: its views -> those of the oracle."""
  z, tokens, valid, old, reward = arrays(seed)
  mask = valid if mask is None else mask
  as32 = lambda x: jnp.asarray(x, jnp.float32)
  views = {view: as32(z[theirs]) for view, theirs in names.items()}
  objective = settings.build()

  def loss(student, views):
    return objectives.objective_loss(
      objective,
      student,
      views,
      jnp.asarray(tokens),
      jnp.asarray(mask),
      logp=as32(old),
      reward=as32(reward),
      samples=M,
      key=jax.random.key(0),
      **extra,
    )

  both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (value, aux), (grad, of_views) = both(as32(z['S']), views)
  assert not any(np.any(x) for x in of_views.values())  # views are constants
  return value, grad, aux.plan


def row(make, names, oracle, *needs, **settings):
  return make, names, oracle, needs, settings


S = objectives
T, Tp = {'T': 'T'}, {'Tp': 'Tp'}
CASES = {
  'opd': row(
    lambda: S.Opd(k=5), T, 'opd', divergence='reverse_kl', region='top_k', k=5, tail='bucket',
    reduction='sequence',
  ),
  'opd, privileged, JS, full': row(
    lambda: S.Opd(divergence='js', region='full', teacher_context='privileged'), Tp, 'opd',
    divergence='js', region='full', k=5, tail='bucket', reduction='sequence', source='Tp',
  ),
  'thinking_machines': row(
    lambda: S.ThinkingMachines(coefficient=0.7), T, 'thinking_machines', 'old',
    coefficient=0.7, reduction='token',
  ),
  **{
    f'gkd, b={b}': row(
      lambda b=b: S.Gkd(mixture=b), T, 'gkd', weight=b, reduction='token'
    )
    for b in (0.0, 0.25, 0.5, 1.0)
  },
  'opcd': row(
    lambda: S.Opcd(k=5), Tp, 'opcd', k=5, tail='truncate', reduction='token'
  ),
  'exopd': row(
    lambda: S.Exopd(), T | {'R': 'R'}, 'exopd', 'old',
    extrapolation=1.25, clip_low=0.2, clip_high=0.2, reduction='token',
  ),
  'exopd, full': row(
    lambda: S.Exopd(form='full', extrapolation=1.5), T | {'R': 'R'}, 'exopd_full',
    extrapolation=1.5, reduction='token',
  ),
  'eopd': row(
    lambda: S.Eopd(threshold=1.2, alpha=0.7, k=5), T, 'eopd', 'old',
    threshold=1.2, alpha=0.7, k=5, clip_low=0.2, clip_high=0.2, reduction='token',
  ),
  **{
    f'uni_opd, {direction}, {mode}': row(
      lambda d=direction, m=mode: S.UniOpd(
        margin=3.0, direction=d, mode=m, balance=False, outlier=4.0
      ),
      T, 'uni_opd', 'old', 'reward', 'samples', margin=3.0, direction=direction, mode=mode,
      clip_low=0.2, clip_high=0.28, outlier=4.0, reduction='token',
    )
    for direction in ('both', 'correct_up', 'incorrect_down')
    for mode in ('mean', 'minmax')
  },
  'opsd': row(lambda: S.Opsd(clip=0.05), {'Fp': 'F'}, 'opsd', clip=0.05, reduction='sequence'),
  'sdft': row(lambda: S.Sdft(), {'Fp': 'F'}, 'sdft', k=V, tail='bucket', reduction='sequence'),
  'sdft, top 5': row(
    lambda: S.Sdft(region='top_k', k=5), {'Fp': 'F'}, 'sdft', k=5, tail='bucket',
    reduction='sequence',
  ),
  **{
    f'sdpo, b={b}': row(
      lambda b=b: S.Sdpo(k=5, mixture=b, ratio_cap=1.1), {'Fs': 'F'}, 'sdpo', 'old', 'hint',
      weight=b, k=5, ratio_cap=1.1, reduction='token',
    )
    for b in (0.5, 1.0)
  },
  'tip': row(lambda: S.Tip(share=0.3), {'S': 'S'} | T, 'tip', share=0.3, reduction='token'),
  'vision_opd': row(
    lambda: S.VisionOpd(k=5, ratio_cap=1.1), {'Fc': 'F'}, 'vision_opd', 'old',
    weight=0.5, k=5, ratio_cap=1.1, reduction='token',
  ),
  'va_opd': row(
    lambda: S.VaOpd(region='full', top_share=0.4, mix=0.3, softmax_temperature=0.7),
    T | {'Td': 'Td'}, 'va_opd', 'samples', temperature=0.7, top_share=0.4, mix=0.3,
    reduction='token',
  ),
  **{
    f'drop_by_gap, {which}': row(
      lambda w=which: S.DropByGap(drop=w, share=0.4, k=V),
      {'Sp': 'Sp', 'Tp': 'Tp', 'T': 'T'}, 'drop_by_gap', which=which, share=0.4,
      reduction='sequence',
    )
    for which in ('largest', 'smallest')
  },
  'dopd': row(
    lambda: S.Dopd(k=5), {'Sp': 'Sp', 'Tp': 'Tp'}, 'dopd', k=5, beta_light=0.6, beta_weak=0.3,
    trim=0.05, reduction='sequence',
  ),
  **{
    f'{name}, {scope}': row(
      lambda c=settings, s=scope: c(k=5, scope=s), {'Sp': 'Sp', 'Tp': 'Tp'}, name, k=5, scope=scope,
    )
    for name, settings in (
      ('dopd_distributional', S.DopdDistributional), ('dopd_signed', S.DopdSigned)
    )
    for scope in ('batch', 'sequence')
  },
  'hint_routing, by sequence': row(
    lambda: S.HintRouting(scope='sequence', levels=3),
    {view: view for view in ('Sp', 'S', 'T', 'Tp')}, 'hint_routing', scope='sequence', levels=3,
  ),
  'hint_routing, learned': row(
    lambda: S.HintRouting(signal='learned', levels=4, coefficients=(-0.5, 3.0, -2.0, 0.4)),
    {view: view for view in ('Sp', 'S', 'T', 'Tp')}, 'hint_routing', signal='learned', levels=4,
    learned=(-0.5, 3.0, -2.0, 0.4),
  ),
  **{
    f'hint_routing, {signal}, {levels}': row(
      lambda s=signal, n=levels, d=divergence: S.HintRouting(
        signal=s, levels=n, mixture=0.3, divergence=d, trim=0.2
      ),
      {view: view for view in (*views, 'T', 'Tp')}, 'hint_routing', signal=signal, levels=levels,
      mixture=0.3, weight=weight, trim=0.2,
    )
    for signal, views in (('student', ('Sp', 'S')), ('teacher', ()), ('none', ()))
    for levels, divergence, weight in ((2, 'js', 0.5), (5, 'reverse_kl', 1))
  },
}  # fmt: skip


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient(name, seed):
  make, names, oracle, needs, settings = CASES[name]
  z, tokens, mask, old, reward = arrays(seed)
  has_hint = np.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
  extra = {'old': {'old_logp': old}, 'reward': {'reward': reward}, 'samples': {'samples': M}}
  extra['hint'] = {'has_hint': has_hint}
  for need in needs:
    settings = settings | extra[need]
  want, want_grad = getattr(oracles, oracle)(z, tokens, mask, **settings)
  supervised = mask & has_hint[:, None] if 'hint' in needs else mask
  got, grad, _ = ours(make(), names, seed, mask=supervised)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(grad, want_grad, rtol=2e-4, atol=2e-6)
  assert np.abs(want_grad).max() > 1e-3  # a test of zeros would pass whatever the method did


def same(a, b, **kwargs):
  (loss_a, grad_a, _), (loss_b, grad_b, _) = ours(*a, **kwargs), ours(*b, **kwargs)
  np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(grad_a, grad_b, rtol=1e-4, atol=1e-6)


TR = T | {'R': 'R'}
UNCLIPPED = dict(clip_low=0.0, clip_high=0.0)
FULL = lambda divergence: S.Opd(divergence=divergence, region='full', reduction='token')


@pytest.mark.parametrize(
  'a, b',
  [
    ((S.Exopd(extrapolation=1.0, **UNCLIPPED), TR), (S.ThinkingMachines(), T)),
    ((S.Exopd(extrapolation=1.0, form='full'), TR),
     (FULL('reverse_kl'), T)),
    ((S.Eopd(threshold=math.log(V) + 1e-3, **UNCLIPPED), T), (S.ThinkingMachines(), T)),
    ((S.Tip(share=1.0), {'S': 'S'} | T), (FULL('reverse_kl'), T)),
    ((S.Gkd(mixture=0.0), T), (FULL('forward_kl'), T)),
    ((S.Gkd(mixture=1.0), T), (FULL('reverse_kl'), T)),
    ((S.Gkd(mixture=0.5), T), (FULL('js'), T)),
    ((S.UniOpd(margin=-math.inf, balance=False, outlier=math.inf, **UNCLIPPED), T),
     (S.ThinkingMachines(), T)),
    ((S.Opsd(clip=math.inf), {'Fp': 'F'}), (S.Opsd(clip=0.0), {'Fp': 'F'})),
    ((S.Opsd(clip=0.0, reduction='token'), {'Fp': 'T'}), (S.Gkd(mixture=0.0), T)),
    ((S.DropByGap(share=0.0, k=5), {'Sp': 'Sp', 'Tp': 'Tp', 'T': 'T'}), (S.Opd(k=5), T)),
    ((S.DropByGap(share=0.0, k=5, drop='random'), {'Sp': 'Sp', 'Tp': 'Tp', 'T': 'T'}),
     (S.Opd(k=5), T)),
    ((S.Sdpo(k=5, mixture=1.0, ratio_cap=0.0), {'Fs': 'T'}), (S.Opd(k=5, reduction='token'), T)),
    ((S.Opcd(k=5, tail='bucket'), {'Tp': 'T'}), (S.Opd(k=5, reduction='token'), T)),
    ((S.HintRouting(signal='none', mixture=0.0), T | Tp),
     (S.Opd(divergence='js', region='full'), T)),
    ((S.HintRouting(signal='none', mixture=1.0), T | Tp),
     (S.Opd(divergence='js', region='full', teacher_context='privileged'), Tp)),
    ((S.HintRouting(), {'Sp': 'S', 'S': 'S'} | T | Tp),  # a hint that tells nothing is trusted
     (S.Opd(divergence='js', region='full', teacher_context='privileged'), Tp)),
  ],
)  # fmt: skip
def test_limits(a, b):
  """Where a method's knob is turned off, it is a simpler one."""
  same(a, b)


@pytest.mark.parametrize(
  'changes, sentence',
  [
    ({'levels': 1}, 'objective.levels must be 2 to 101, not 1'),
    (
      {'signal': 'both'},
      "objective.signal must be one of student, teacher, learned, none, not 'both'",
    ),
    ({'signal': 'learned'}, r"coefficients must be 4 numbers with signal='learned', not \(\)"),
    ({'coefficients': (1.0,)}, "coefficients must be 0 numbers with signal='student'"),
    ({'trim': 1.0}, r'objective.trim must be in \[0, 1\), not 1.0'),
    ({'mixture': 1.5}, r'objective.mixture must be in \[0, 1\], not 1.5'),
    ({'scope': 'row'}, 'objective.scope must be one of batch, sequence'),
  ],
)
def test_hint_routing_refuses(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    S.HintRouting(**changes).build()


def test_dopd_with_an_empty_hint():
  """Sp is S: LL and HS give nothing, and the rest is what LH and HT give alone."""
  names = {'Sp': 'S', 'Tp': 'T'}
  _, grad, plan = ours(S.Dopd(k=5), names)
  own = np.isin(plan.regime, (losses.Regime.LL, losses.Regime.HS))
  assert own.any()
  np.testing.assert_allclose(np.asarray(grad)[own], 0, atol=1e-7)
  none = dict(divergence='reverse_kl', region='top_k', strength='none')
  cell = lambda: objectives.dopd.Cell('self', **none)
  same((S.Dopd(k=5), names), (S.Dopd(k=5, LL=cell(), HS=cell()), names))


def test_va_opd_rollout_weights():
  """The paper's numeric example; a completion without tokens has no part in its prompt's loss."""
  mean = jnp.array([[0.045, 0.03, 0.02, 0.01], [0.1, 7.0, 0.2, 0.3]])
  alive = jnp.array([[True] * 4, [True, False, True, True]])
  weight = va_opd.rollout_weights(mean, alive)
  np.testing.assert_allclose(weight[0], [0.656, 0.206, 0.095, 0.044], atol=6e-4)
  assert weight[1, 1] == 0 and math.isclose(weight[1].sum(), 1.0, rel_tol=1e-6)


def test_the_sampled_gradient_of_va_opd_is_that_of_the_full_one_on_average():
  """Weights, sets and rule depend on y only through the score: averaged over y ~ S they agree."""
  z, _, mask, _, _ = arrays()
  student = jnp.asarray(z['S'], jnp.float32)
  teacher = jnp.asarray(z['T'], jnp.float32)
  rule = S.VaOpd().build().rules[0][0]
  p = jax.nn.softmax(student)

  def sampled(student, y):
    tokens = jnp.full((B, N), y)
    table, regime = ((rule,),), jnp.where(mask, 0, -1)
    loss = losses.batched_token_loss(table, student, {rule.source: teacher}, tokens, regime)
    return (loss * jax.lax.stop_gradient(p[..., y])).sum()

  grad = sum(jax.grad(sampled)(student, y) for y in range(V))
  full = lambda s: (
    losses.reverse_kl(jax.nn.log_softmax(s), jax.nn.log_softmax(teacher)) * mask
  ).sum()
  np.testing.assert_allclose(grad, jax.grad(full)(student), atol=1e-5)


def test_uni_opd_keeps_as_many_right_as_wrong():
  right = jnp.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
  alive = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
  seen = set()
  for seed in range(20):
    kept = np.asarray(objectives.uni_opd.balanced(jax.random.key(seed), right, alive))
    assert not (kept & ~np.asarray(alive)).any()
    np.testing.assert_array_equal((kept & np.asarray(right)).sum(1), [1, 0, 4, 1])
    np.testing.assert_array_equal((kept & ~np.asarray(right)).sum(1), [1, 3, 0, 1])
    seen.add(tuple(kept[0].tolist()))
  assert len(seen) == 3  # each of the three right ones is drawn at times


def test_random_drop_keeps_its_share_and_follows_its_key():
  z, tokens, mask, *_ = arrays()
  objective = S.DropByGap(drop='random', share=0.4, k=5).build()
  views = {name: jnp.asarray(z[name], jnp.float32) for name in objective.views}
  kept = []
  for seed in (0, 0, 1):
    _, aux = objectives.objective_loss(
      objective, jnp.asarray(z['S']), views, jnp.asarray(tokens), jnp.asarray(mask),
      key=jax.random.key(seed),
    )  # fmt: skip
    kept.append(np.asarray(aux.plan.regime == 0))
    assert kept[-1].sum() == math.floor(0.6 * mask.sum() + 0.5)
  assert (kept[0] == kept[1]).all() and (kept[0] != kept[2]).any()


def test_random_regimes_are_as_many_of_each():
  z, tokens, mask, *_ = arrays()
  views = {name: jnp.asarray(z[name], jnp.float32) for name in ('Sp', 'Tp')}
  regimes = lambda make, seed=0: np.asarray(
    objectives.objective_loss(
      make(k=5).build(), jnp.asarray(z['S']), views, jnp.asarray(tokens), jnp.asarray(mask),
      key=jax.random.key(seed),
    )[1].plan.regime
  )  # fmt: skip
  routed, dealt = regimes(S.Dopd), [regimes(S.DopdRandom, seed) for seed in (0, 0, 1)]
  for regime in dealt:
    np.testing.assert_array_equal(regime == -1, ~np.asarray(mask, bool))
    np.testing.assert_array_equal(np.sort(regime, axis=None), np.sort(routed, axis=None))
  assert (
    (dealt[0] == dealt[1]).all() and (dealt[0] != dealt[2]).any() and (dealt[0] != routed).any()
  )


@pytest.mark.parametrize('share', [0.0, 0.2, 0.5, 0.8, 1.0])
def test_top_share_counts(share):
  """Of 5 tokens .2 is one, .5 rounds up to three, and 0 still keeps one; ties go to the first."""
  score = jnp.array([1.0, 3.0, 3.0, 2.0, 0.0, 9.0])
  mask = jnp.array([1, 1, 1, 1, 1, 0], bool)
  kept = losses.top_share(score, mask, share)
  assert kept.sum() == {0.0: 1, 0.2: 1, 0.5: 3, 0.8: 4, 1.0: 5}[share]
  assert kept[1] and not kept[5]


def test_a_ratio_that_would_overflow_stays_finite():
  logp, old = jnp.array([-1.0, -500.0]), jnp.array([-300.0, -1.0])
  value, grad = jax.value_and_grad(
    lambda x: losses.clipped_surrogate(x, old, jnp.array([-1.0, 1.0])).sum()
  )(logp)
  assert jnp.isfinite(value) and jnp.isfinite(grad).all()
