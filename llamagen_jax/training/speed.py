"""How fast a run goes: tokens, share of the chips' peak, memory in use."""

import dataclasses

import jax

from llamagen_jax.parallel.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Work:
  """The size of one step or several, over all chips."""

  tokens: int  # positions that the transformer computes
  flops: float  # model FLOPs: what the maths needs, recomputation not counted


def speed(work: Work, seconds: float) -> dict[str, float]:
  """Returns tokens a second, in all and a chip, and `mfu` for a chip of a known peak.

  Model FLOP/s utilisation is model FLOPs over dense bfloat16 peak (PaLM, arXiv
  2204.02311, appendix B), whatever the type a run computes in.
  """
  device, chips = jax.devices()[0], jax.device_count()
  tokens = work.tokens / seconds
  row = {"tokens_per_second": tokens, "tokens_per_second_per_chip": tokens / chips}
  if chip := CHIPS.get(device.device_kind):
    row["mfu"] = work.flops / seconds / (chips * chip.peak_flops)
  return row


def memory(device: jax.Device) -> dict[str, float]:
  """Returns GiB of a chip's memory in use, now and at most; {} if it does not tell."""
  stats = device.memory_stats() or {}
  names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
  return {name: stats[key] / 2**30 for name, key in names.items() if key in stats}
