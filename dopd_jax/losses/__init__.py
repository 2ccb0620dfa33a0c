"""The loss kernels: pure functions of arrays, in nats. Imports jax and nothing else of ours.

Kernels work on log-probabilities `[..., V]`; `dopd_loss` is the whole method on logits `[B, N, V]`.
"""

from dopd_jax.losses.divergences import clipped_forward_kl as clipped_forward_kl
from dopd_jax.losses.divergences import forward_kl as forward_kl
from dopd_jax.losses.divergences import generalised_js as generalised_js
from dopd_jax.losses.divergences import js_divergence as js_divergence
from dopd_jax.losses.divergences import log_probs as log_probs
from dopd_jax.losses.divergences import reverse_kl as reverse_kl
from dopd_jax.losses.dopd import DopdAux as DopdAux
from dopd_jax.losses.dopd import dopd_loss as dopd_loss
from dopd_jax.losses.dopd import dopd_rules as dopd_rules
from dopd_jax.losses.pairing import completion_rows as completion_rows
from dopd_jax.losses.pairing import pack as pack
from dopd_jax.losses.pairing import pack_positions as pack_positions
from dopd_jax.losses.policy_gradient import capped_ratio as capped_ratio
from dopd_jax.losses.policy_gradient import clipped_surrogate as clipped_surrogate
from dopd_jax.losses.reduction import coefficients as coefficients
from dopd_jax.losses.routing import Regime as Regime
from dopd_jax.losses.routing import Routing as Routing
from dopd_jax.losses.routing import privilege_advantage_gap as privilege_advantage_gap
from dopd_jax.losses.routing import route as route
from dopd_jax.losses.routing import trimmed_mean as trimmed_mean
from dopd_jax.losses.rules import Rule as Rule
from dopd_jax.losses.rules import batched_token_loss as batched_token_loss
from dopd_jax.losses.rules import token_loss as token_loss
from dopd_jax.losses.selection import min_max as min_max
from dopd_jax.losses.selection import top_share as top_share
from dopd_jax.losses.support import on_support as on_support
from dopd_jax.losses.support import sampled_token as sampled_token
from dopd_jax.losses.support import top_k_reverse_kl as top_k_reverse_kl
