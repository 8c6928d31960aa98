"""What a GPU will be asked for can be lowered for one on any machine."""

import pytest

from benchmarks import gpu


@pytest.mark.parametrize(
  "case",
  [
    gpu.decode_case("B", 256, 1), gpu.train_case("B", 256, 2, "xla"),
    gpu.tokenizer_case("decode"),
  ],
  ids=lambda case: case.part,
)  # fmt: skip
def test_programs_lower_for_cuda(case):
  assert gpu.lowered(case)["cells"][2].startswith("lowers, ")
