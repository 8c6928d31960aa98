"""Quality of sampling with 8 bits: the quickstart's transformer on held-out codes.

llamagen quickstart --workdir=quickstart
python -m benchmarks.quantization --quickstart=quickstart

Every held-out image is read code by code by the decoding step, so that each code sees
keys and values as sampling would have them. KL is from the logits in float32; nats are
-log p of the held-out codes. Then images of all classes are sampled with the settings
of the bundle, with the same keys: the share of codes, and of images, that are those of
float32. A single code that differs changes what follows it.
"""

import argparse
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax import generate
from llamagen_jax.data.codes import CodeSource
from llamagen_jax.gpt.cache import init_cache
from llamagen_jax.gpt.cached import decoding_params, prefill_forward, step_forward
from llamagen_jax.gpt.conditioning import attention_mask, embed_prefix
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.model import embed_codes
from llamagen_jax.gpt.quantized import quantize_params
from llamagen_jax.sampling.keys import as_keys, image_keys
from llamagen_jax.weights import bundle

# (activations, weights, cache)
ARMS = (
  ("float32", "float", "float"),
  ("float32", "int8", "float"),
  ("float32", "float", "int8"),
  ("float32", "int8", "int8"),
  ("bfloat16", "float", "float"),
  ("bfloat16", "int8", "int8"),
)
BATCH, SAMPLES = 100, 1000


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quickstart", type=pathlib.Path, required=True)
  args = parser.parse_args()
  gpt = bundle.load_gpt(args.quickstart / "gpt" / "bundle")
  source = CodeSource(args.quickstart / "codes" / "val")
  records = [source[i] for i in range(len(source))]
  codes_NT = np.stack([r.codes[0].astype(np.int32).reshape(-1) for r in records])
  labels_N = np.array([r.label for r in records], np.int32)
  print(f"{len(records)} held-out images, {SAMPLES} samples, {gpt.sampling}\n")
  print("| activations | weights | cache | KL a code | nats a code | equal codes |"
        " equal images |")  # fmt: skip
  print("|---|---|---|---|---|---|---|")
  exact, results = None, []
  for dtype, weights, cache in ARMS:
    config = dataclasses.replace(gpt.config, dtype=dtype, kv_cache=cache)
    params = decoding_params(config, gpt.params)
    params = quantize_params(params) if weights == "int8" else params
    log_p_NTV = held_out(config, params, labels_N, codes_NT)
    drawn_NT = sampled(config, params, gpt.sampling)
    exact = exact or (log_p_NTV, drawn_NT)
    row = {
      "arm": (dtype, weights, cache),
      "kl": float(kl(exact[0], log_p_NTV)),
      "nats": float(-np.take_along_axis(log_p_NTV, codes_NT[..., None], 2).mean()),
      "codes": float(np.mean(drawn_NT == exact[1])),
      "images": float(np.mean((drawn_NT == exact[1]).all(axis=1))),
    }
    results.append(row)
    print(
      f"| {dtype} | {weights} | {cache} | {row['kl']:.1e} | {row['nats']:.4f} |"
      f" {row['codes']:.1%} | {row['images']:.1%} |", flush=True,
    )  # fmt: skip
  print(json.dumps(results))


def kl(p_NTV: np.ndarray, q_NTV: np.ndarray) -> np.ndarray:
  """Returns the mean KL divergence, of logarithms of probabilities."""
  return np.mean(np.sum(np.exp(p_NTV) * (p_NTV - q_NTV), axis=-1, dtype=np.float64))


def held_out(config, params, labels_N, codes_NT) -> np.ndarray:
  """Returns log p of all codes, given the held-out ones before, [N, T, V]."""
  parts = range(0, len(codes_NT), BATCH)
  return np.concatenate([
    read_codes(config, params, labels_N[i : i + BATCH], codes_NT[i : i + BATCH])
    for i in parts
  ])  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def read_codes(config: GPTConfig, params, labels_B, codes_BT) -> jax.Array:
  """Reads codes one by one with a cache; returns log p [B, T, V] in float32."""
  c, P = config, config.prefix_tokens
  x_BPD = embed_prefix(c, params, labels_B, jnp.zeros(len(labels_B), bool))
  mask = attention_mask(c, None, jnp.arange(P))
  first_BV, cache = prefill_forward(
    c, params, x_BPD, init_cache(c, len(codes_BT), c.length), mask
  )

  def step(cache, at):
    code_B, position = at
    x_B1D = embed_codes(params["code_embedding"], code_B[:, None], c.dtype)
    mask = attention_mask(c, None, position[None])
    logits_BV, cache = step_forward(c, params, x_B1D, cache, position, mask)
    return cache, logits_BV

  positions = P + jnp.arange(c.image_tokens - 1)
  _, logits_TBV = jax.lax.scan(step, cache, (codes_BT[:, :-1].T, positions))
  logits_TBV = jnp.concatenate([first_BV[None], logits_TBV])
  return jax.nn.log_softmax(logits_TBV.swapaxes(0, 1))


def sampled(config, params, sampling) -> np.ndarray:
  """Returns the codes of SAMPLES images with keys of their own, [N, T]."""
  labels = np.arange(SAMPLES) % config.num_classes
  keys = as_keys(image_keys(0, range(SAMPLES)))
  return np.concatenate([
    generate(config, params, labels[i : i + BATCH], keys[i : i + BATCH],
             sampling=sampling)
    for i in range(0, SAMPLES, BATCH)
  ])  # fmt: skip


if __name__ == "__main__":
  main()
