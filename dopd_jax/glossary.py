"""The one place that says what a metric's name means: its label, its unit, a sentence."""

from typing import NamedTuple


class Metric(NamedTuple):
  """A metric's name for people, its unit ('' for none) and what it means in one sentence."""

  label: str
  unit: str
  meaning: str


# `<regime>` stands for any regime's name: LH, LL, HT and HS for DOPD. `metric` looks names up.
METRICS: dict[str, Metric] = {
  'eval/accuracy': Metric(
    'Accuracy, held out', 'share', 'Right answers of the plain student on held-out prompts.'
  ),
  'eval/accuracy_low': Metric(
    'Accuracy, lower end', 'share', "Lower end of the accuracy's 95 % Wilson interval."
  ),
  'eval/accuracy_high': Metric(
    'Accuracy, upper end', 'share', "Upper end of the accuracy's 95 % Wilson interval."
  ),
  'eval/reverse_kl': Metric(
    'KL(S || T)', 'nats', "From the plain student to the plain teacher, a step's completions."
  ),
  'eval/forward_kl': Metric(
    'KL(T || S)', 'nats', 'The same from the teacher to the student, on the same tokens.'
  ),
  'eval/teacher_accuracy': Metric(
    "Teacher's accuracy", 'share', 'Right answers of the teacher on the same prompts.'
  ),
  'train/loss': Metric('Loss', 'nats', "Token losses times their regime's weight, over a batch."),
  'train/regime_loss/<regime>': Metric(
    'Loss, part of <regime>',
    'nats',
    "The regime's tokens' part of the loss; all parts add up to it.",
  ),
  'train/entropy/S': Metric(
    'Entropy of S', 'nats', 'Mean next-token entropy of the student, plain prompt.'
  ),
  'train/entropy/Sp': Metric(
    'Entropy of Sp', 'nats', 'The same of the student that also sees the privileged context.'
  ),
  'train/entropy/Tp': Metric(
    'Entropy of Tp', 'nats', 'The same of the teacher that also sees the privileged context.'
  ),
  'train/entropy/T': Metric(
    'Entropy of T', 'nats', 'The same of the teacher that sees the plain prompt.'
  ),
  'train/entropy/Ts': Metric(
    'Entropy of Ts', 'nats', 'The same of the teacher that sees a right completion as hint.'
  ),
  'train/entropy/Td': Metric(
    'Entropy of Td', 'nats', 'The same of the teacher that sees the degraded image.'
  ),
  'train/entropy/Sr': Metric(
    'Entropy of Sr', 'nats', 'The same of the frozen or averaged student with the hint.'
  ),
  'train/entropy/R': Metric('Entropy of R', 'nats', 'The same of the reference, plain prompt.'),
  'train/entropy/F': Metric(
    'Entropy of F', 'nats', 'The same of the copy of the student that guides, plain prompt.'
  ),
  'train/entropy/Fp': Metric(
    'Entropy of Fp', 'nats', 'The same of that copy with the privileged context.'
  ),
  'train/entropy/Fs': Metric(
    'Entropy of Fs', 'nats', 'The same of that copy with a right completion as hint.'
  ),
  'train/entropy/Fc': Metric(
    'Entropy of Fc', 'nats', 'The same of that copy with the cropped image.'
  ),
  'train/entropy/Fb': Metric(
    'Entropy of Fb', 'nats', 'The same of that copy with the boxes drawn into the image.'
  ),
  'train/regime_share/<regime>': Metric(
    'Share of <regime>', 'share', 'Tokens of the rollout batch routed to the regime.'
  ),
  'train/regime_share_right/<regime>': Metric(
    'Share of <regime>, right',
    'share',
    'The same among the tokens of right answers (reward 0.5 or more).',
  ),
  'train/regime_share_wrong/<regime>': Metric(
    'Share of <regime>, wrong', 'share', 'The same among the tokens of wrong answers.'
  ),
  'train/gap': Metric(
    'Privilege advantage gap',
    'nats',
    "Mean of the method's gap; DOPD's is |log q_T - log q_S| of a token.",
  ),
  'train/gap_threshold': Metric(
    'Gap threshold', 'nats', 'Trimmed mean of the gap: at or above it a token is HT or HS.'
  ),
  'train/gap_threshold_teacher': Metric(
    "Gap threshold, teacher's side", 'nats', 'The same over the tokens with q_T >= q_S: HT.'
  ),
  'train/gap_threshold_student': Metric(
    "Gap threshold, student's side", 'nats', 'The same over the tokens with q_T < q_S: HS.'
  ),
  'train/confidence': Metric(
    'Confidence', 'q_S + q_T', 'Mean of q_S + q_T over the sampled tokens.'
  ),
  'train/confidence_threshold': Metric(
    'Confidence threshold', 'q_S + q_T', 'Trimmed mean of q_S + q_T: at or above it LH, else LL.'
  ),
  'train/certainty': Metric(
    'Certainty', 'nats', 'Mean of -H(Sp) - H(Tp), which stands for confidence in some methods.'
  ),
  'train/certainty_threshold': Metric(
    'Certainty threshold', 'nats', 'Trimmed mean of it: at or above it LH, else LL.'
  ),
  'train/grad_norm': Metric('Gradient norm', '', 'Norm of the gradient, before clipping.'),
  'train/head_grad_norm/<regime>': Metric(
    'Head gradient, <regime>', '', "Norm of the loss gradient at the head's input, by regime."
  ),
  'train/effective_weight': Metric(
    'Effective weight', '', 'Mean weight of the rules over the tokens; 1 for vanilla OPD.'
  ),
  'train/loss_token_share': Metric(
    'Tokens with loss', 'share', 'Completion tokens whose loss enters the mean.'
  ),
  'train/extra_forwards': Metric(
    'Extra forwards', '', "Forward passes a step beside the student's own with gradient."
  ),
  'train/shifted_prompts': Metric(
    'Shifted prompts', 'share', 'Prompts whose advantages Uni-OPD had to move apart.'
  ),
  'train/hint_told': Metric(
    'What the hint tells', 'nats', 'JS of a policy with the hint from itself without, a token.'
  ),
  'train/hint_threshold': Metric(
    'Threshold of what the hint tells',
    'nats',
    'Trimmed mean of it; above, the plain teacher is trusted more.',
  ),
  'train/image_gain': Metric(
    'Image gain', 'nats', "Mean gain of the teacher's log-prob from the undegraded image."
  ),
  'train/accuracy': Metric(
    'Accuracy, sampled', 'share', 'Mean reward of the sampled completions that a verifier knows.'
  ),
  'train/completion_length': Metric(
    'Completion length', 'tokens', 'Mean number of sampled tokens, the stop token included.'
  ),
  'train/truncated_share': Metric(
    'Truncated completions', 'share', 'Completions that ended at the length limit.'
  ),
  'train/rollout_logp_gap': Metric(
    'Sampler/trainer gap', 'nats', "Mean |difference| of the sampler's and trainer's log-probs."
  ),
  'train/rollout_logp_gap_max': Metric(
    'Sampler/trainer gap, largest', 'nats', 'The largest such difference of any token.'
  ),
  'train/lag': Metric(
    'Lag', 'updates', 'Updates between the sampling of a rollout batch and the training on it.'
  ),
  'train/empty_completions': Metric(
    'Empty completions', 'rows', 'Completions without a token; they take no part in the loss.'
  ),
  'eval/teacher_accuracy_low': Metric(
    "Teacher's accuracy, lower end", 'share', 'Lower end of its 95 % Wilson interval.'
  ),
  'eval/teacher_accuracy_high': Metric(
    "Teacher's accuracy, upper end", 'share', 'Upper end of its 95 % Wilson interval.'
  ),
  'time/step_seconds': Metric('Step', 's', 'Wall time of a rollout batch, compilation included.'),
  'time/score_seconds': Metric(
    'Scoring', 's', 'Wall time of the extra forwards of one step, measured at a look.'
  ),
  'time/accuracy_seconds': Metric('Evaluation', 's', 'Wall time of measuring the student.'),
  'time/teacher_accuracy_seconds': Metric(
    'Evaluation, teacher', 's', 'Wall time of measuring the teacher.'
  ),
  'time/tokens_per_second': Metric(
    'Throughput', 'tokens/s', 'Sampled tokens trained on, per second of wall time.'
  ),
}


def metric(name: str) -> Metric:
  """What a row's metric `name` means; a name that `METRICS` does not know labels itself."""
  if name in METRICS:
    return METRICS[name]
  family, _, last = name.rpartition('/')
  if family in METRICS:  # of one part: eval/accuracy/math
    return METRICS[family]._replace(label=f'{METRICS[family].label}: {last}')
  known = METRICS.get(f'{family}/<regime>', Metric(name, '', ''))
  return known._replace(label=known.label.replace('<regime>', last))
