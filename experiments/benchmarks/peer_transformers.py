"""`transformers` generate on the sampler's workload: random Qwen3, no stop token.

    python experiments/benchmarks/peer_transformers.py

Prints one JSON line; needs torch, which the tests of this package install.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument('--batch', type=int, default=32)
parser.add_argument('--prompt', type=int, default=32)
parser.add_argument('--new', type=int, default=128)
parser.add_argument('--runs', type=int, default=5)
a = parser.parse_args()
torch.manual_seed(0)
model = Qwen3ForCausalLM(
  Qwen3Config(
    vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    pad_token_id=0, eos_token_id=None, bos_token_id=None,
  )
).eval()  # fmt: skip
prompt = torch.randint(1, 4096, (a.batch, a.prompt))
seconds = []
with torch.no_grad():
  for _ in range(a.runs + 1):
    start = time.perf_counter()
    out = model.generate(
      prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0,
      top_p=1.0, max_new_tokens=a.new, min_new_tokens=a.new,
    )  # fmt: skip
    seconds.append(time.perf_counter() - start)
median = statistics.median(seconds[1:])
tokens = a.batch * (out.shape[1] - a.prompt)
print(json.dumps({'peer': 'transformers', 'tokens': tokens, 'median_s': median,
                  'tokens_per_s': round(tokens / median)}))  # fmt: skip
