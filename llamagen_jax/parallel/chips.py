"""What a chip can do, from its vendor's data sheet."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  name: str
  peak_flops: float  # dense bfloat16 multiply-adds, counted twice, a second
  hbm_bytes: int
  hbm_bandwidth: float  # bytes a second
  link_bandwidth: float = 0.0  # bytes a second, one torus link in one direction
  wraps: int = 0  # a torus axis of a multiple of this closes to a ring; 0 = none


# By `Device.device_kind`. TPU: cloud.google.com/tpu/docs/system-architecture-tpu-vm;
# v4 and v5p wrap axes of 4, 8, .. chips, v5e and v6e those of 16.
CHIPS = {
  "TPU v4": Chip("v4", 275e12, 32 << 30, 1228e9, 45e9, 4),
  "TPU v5 lite": Chip("v5e", 197e12, 16 << 30, 819e9, 45e9, 16),
  "TPU v5": Chip("v5p", 459e12, 95 << 30, 2765e9, 90e9, 4),
  "TPU v5p": Chip("v5p", 459e12, 95 << 30, 2765e9, 90e9, 4),
  "TPU v6 lite": Chip("v6e", 918e12, 32 << 30, 1640e9, 90e9, 16),
  "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40 << 30, 1555e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80 << 30, 2039e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80 << 30, 3350e9),
}
