"""Liger's fused linear JSD on the workload of `head`: forward and backward on a CUDA GPU.

    python experiments/benchmarks/peer_liger.py --tokens=4096 --student_width=2048

Prints one JSON line; needs torch, triton and liger_kernel. `gradient_error` is of the student's
hidden states over the first 1,024 tokens, relative to the definition in float32 on the same inputs.
"""

import argparse
import json
import math
import statistics
import time

import torch
from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

parser = argparse.ArgumentParser()
parser.add_argument('--tokens', type=int, default=4096)
parser.add_argument('--vocab', type=int, default=151_936)
parser.add_argument('--student_width', type=int, default=1024)
parser.add_argument('--teacher_width', type=int, default=2048)
parser.add_argument('--runs', type=int, default=5)
a = parser.parse_args()
torch.manual_seed(0)
make = lambda *shape, scale=1.0: (scale * torch.randn(*shape, device='cuda')).bfloat16()
hidden = make(a.tokens, a.student_width).requires_grad_()
head = make(a.vocab, a.student_width, scale=0.02).requires_grad_()
teacher, teacher_head = make(a.tokens, a.teacher_width), make(a.vocab, a.teacher_width, scale=0.02)
fused = LigerFusedLinearJSD(jsd_beta=0.5, accum_dtype=torch.float32)


def step(tokens):
  """Loss of the first tokens; gradients are in `hidden` and `head`."""
  hidden.grad = head.grad = None
  loss = fused(hidden[:tokens], head, teacher[:tokens], teacher_head, None)
  loss.backward()
  torch.cuda.synchronize()
  return float(loss)


def definition(tokens):
  """The mean JS of the first tokens in float32; its gradient in their hidden states."""
  x = hidden[:tokens].detach().float().requires_grad_()
  log_p = (x @ head.detach().float().T).log_softmax(-1)
  log_q = (teacher[:tokens].float() @ teacher_head.float().T).log_softmax(-1)
  log_m = torch.logaddexp(log_p, log_q) - math.log(2)
  kl = lambda log: (log.exp() * (log - log_m)).sum(-1)
  (0.5 * (kl(log_p) + kl(log_q))).mean().backward()
  return x.grad


before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
seconds = []
for _ in range(a.runs + 1):
  start = time.perf_counter()
  loss = step(a.tokens)
  seconds.append(time.perf_counter() - start)
peak = torch.cuda.max_memory_allocated() - before
few = min(a.tokens, 1024)
step(few)
true = definition(few)
error = (hidden.grad[:few].float() - true).norm() / true.norm()
print(json.dumps({
  'peer': 'liger', 'loss': loss, 'median_s': statistics.median(seconds[1:]),
  'peak_gib_over_inputs': round(peak / 2**30, 3), 'gradient_error': float(error),
}))  # fmt: skip
