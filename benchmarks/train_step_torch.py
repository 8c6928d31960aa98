"""Seconds of an eager PyTorch train step of GPT-B's shape, to set beside ours.

pip install -e '.[convert]'
python -m benchmarks.train_step_torch          # 256 codes, batch 8, float32
python -m benchmarks.train_step                # ours, with the same work

Weights, optimizer and dropout are those of LlamaGen's recipe; attention is PyTorch's
fused kernel, with causal masking. Axes as in the package: B T D N H F V.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

LAYERS, D, N, F, V, CLASSES, T = 12, 768, 12, 2048, 16384, 1000, 256
H = D // N
DROPOUT = 0.1


class Block(nn.Module):
  """x [B, T, D], rotations [T, H / 2] complex -> [B, T, D]."""

  def __init__(self):
    super().__init__()
    self.norms = nn.ModuleList(nn.RMSNorm(D, eps=1e-5) for _ in range(2))
    self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
    self.gate, self.up = (nn.Linear(D, F, bias=False) for _ in range(2))
    self.down = nn.Linear(F, D, bias=False)

  def forward(self, x_BTD, rotations_TH):
    B, length, _ = x_BTD.shape
    heads = self.qkv(self.norms[0](x_BTD)).view(B, length, 3, N, H)
    q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
    attended = functional.scaled_dot_product_attention(
      rotated(q, rotations_TH), rotated(k, rotations_TH), v, is_causal=True
    )
    out = self.out(attended.transpose(1, 2).reshape(B, length, D))
    x_BTD = x_BTD + functional.dropout(out, DROPOUT)
    h = self.norms[1](x_BTD)
    out = self.down(functional.silu(self.gate(h)) * self.up(h))
    return x_BTD + functional.dropout(out, DROPOUT)


def rotated(x_BNTH, rotations_TH):
  """Returns pairs of neighbouring channels, turned."""
  pairs = torch.view_as_complex(x_BNTH.reshape(*x_BNTH.shape[:-1], H // 2, 2))
  return torch.view_as_real(pairs * rotations_TH).flatten(-2)


class Transformer(nn.Module):
  """Classes [B] and codes [B, T] -> the mean cross entropy of the codes."""

  def __init__(self):
    super().__init__()
    self.classes, self.codes = nn.Embedding(CLASSES + 1, D), nn.Embedding(V, D)
    self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
    self.norm, self.head = nn.RMSNorm(D, eps=1e-5), nn.Linear(D, V, bias=False)
    angles = torch.rand(T, H // 2)  # which ones costs nothing
    self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles))

  def forward(self, classes_B, codes_BT):
    x = torch.cat([self.classes(classes_B)[:, None], self.codes(codes_BT)[:, :-1]], 1)
    x = functional.dropout(x, DROPOUT)
    for block in self.blocks:
      x = block(x, self.rotations)
    logits_BTV = self.head(self.norm(x))
    return functional.cross_entropy(logits_BTV.flatten(0, 1), codes_BT.flatten())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--steps", type=int, default=3)
  args = parser.parse_args()
  torch.manual_seed(0)
  model = Transformer()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
  )
  classes = torch.randint(CLASSES, (args.batch,))
  codes = torch.randint(V, (args.batch, T))
  times = []
  for _ in range(1 + args.steps):
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    model(classes, codes).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    times.append(time.perf_counter() - began)
  seconds = statistics.median(times[1:])
  print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
  print(f"step                 {seconds:8.2f} s")
  print(json.dumps(vars(args) | {"seconds": seconds}))


if __name__ == "__main__":
  main()
