from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.core.masking import bit_mask, keep_


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
@pytest.mark.parametrize("laid_out", ["contiguous", "transposed", "sliced", "scalar"])
@pytest.mark.parametrize("large", [False, True])
def test_entries_are_selected_and_not_multiplied(
    dtype: torch.dtype, laid_out: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_compress.core.masking._LARGE", 0 if large else 2**20)
    torch.manual_seed(0)
    whole = torch.randn(6, 8).to(dtype)
    mask = torch.rand(6, 8) > 0.5
    if laid_out == "transposed":
        whole, mask = whole.t(), mask.t()
    elif laid_out == "sliced":
        whole, mask = whole[::2, 1:], mask[::2, 1:]
    elif laid_out == "scalar":
        whole, mask = whole[0, 0].clone(), torch.tensor(False)
    for bad in (float("nan"), float("inf"), -float("inf"), -1.0):
        tensor = nn.Parameter(torch.where(mask, whole, torch.tensor(bad, dtype=dtype)))
        keep_(tensor, bit_mask(mask, dtype))
        assert torch.equal(tensor.detach(), torch.where(mask, whole, torch.zeros((), dtype=dtype)))
        assert not torch.signbit(tensor.detach()[~mask].real.float()).any()


def test_what_stays_keeps_its_bits() -> None:
    tensor = torch.tensor([float("nan"), -0.0, 1e-42, float("inf")])
    before = tensor.view(torch.int32).clone()
    keep_(tensor, bit_mask(torch.ones(4, dtype=torch.bool), tensor.dtype))
    assert torch.equal(tensor.view(torch.int32), before)
