"""The peaks of chips, from their vendors' data sheets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as JAX counts them; rates are a second, in bytes where not said."""

  name: str
  peak_flops: float  # dense bfloat16 multiply-adds, counted twice
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float = 0.0  # one torus link in one direction
  dcn_bandwidth: float = 0.0  # a chip's share of its host's network, in one direction


# By `Device.device_kind`.
# TPU: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e, tpu7x. The pages give the
# network of a pod (v5e 6.4 Tb/s of 256 chips) or of a chip (v5p 50 Gb/s, v6e and tpu7x
# 100 Gb/s); v4 is taken as v5p. A tpu7x chip is two devices, each with half of it.
# NVIDIA: data sheets of A100, A10G (of AWS), H100, H200, B200 (of HGX: 180 GB a GPU,
# 7.7 TB/s), L40S; the white paper of Ada Lovelace for the RTX 4090 (float32
# accumulation); all figures without sparsity.
CHIPS = {
  "TPU v4": Chip("v4", 275e12, 32 << 30, 1228e9, 45e9, 6.25e9),
  "TPU v5 lite": Chip("v5e", 197e12, 16 << 30, 819e9, 45e9, 3.125e9),
  "TPU v5": Chip("v5p", 459e12, 95 << 30, 2765e9, 90e9, 6.25e9),
  "TPU v5p": Chip("v5p", 459e12, 95 << 30, 2765e9, 90e9, 6.25e9),
  "TPU v6 lite": Chip("v6e", 918e12, 32 << 30, 1640e9, 90e9, 12.5e9),
  "TPU7x": Chip("tpu7x", 1153.5e12, 96 << 30, 3690e9, 50e9, 6.25e9),
  "NVIDIA A10G": Chip("A10G", 70e12, 24 << 30, 600e9),
  "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40 << 30, 1555e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80 << 30, 2039e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80 << 30, 3350e9),
  "NVIDIA H200": Chip("H200", 989e12, 141 * 10**9, 4800e9),
  "NVIDIA B200": Chip("B200", 2250e12, 180 * 10**9, 7700e9),
  "NVIDIA L40S": Chip("L40S", 362e12, 48 << 30, 864e9),
  "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 165.2e12, 24 << 30, 1008e9),
}
