from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.coding.weights import load_weights


def net(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.mark.parametrize("wrapped", [True, False], ids=["lightning checkpoint", "state dict"])
def test_both_kinds_of_file_are_loaded(wrapped: bool, tmp_path: Path) -> None:
    source, path = net(), tmp_path / "weights"
    state = source.state_dict()
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}} if wrapped else state, path)
    module = net()
    load_weights(module, path)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = net(width=4).state_dict() | {"head.weight": torch.ones(1)}
    del state["1.running_mean"]
    torch.save(state, tmp_path / "other.pt")
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"other\.pt does not fit Sequential") as error:
        load_weights(module, tmp_path / "other.pt")
    message = str(error.value)
    assert "the file has no 1.running_mean" in message
    assert "the file has head.weight, which the module does not have" in message
    assert "0.weight is (4, 2) in the file and (3, 2) in the module" in message
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.ckpt"):
        load_weights(net(), tmp_path / "absent.ckpt")
    (tmp_path / "text.ckpt").write_text("not weights")
    with pytest.raises(ValueError, match=r"text\.ckpt is damaged"):
        load_weights(net(), tmp_path / "text.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"neither a Lightning checkpoint nor a state dict; it holds a list"):
        load_weights(net(), tmp_path / "list.ckpt")
    torch.save(net(), tmp_path / "pickled.ckpt")
    with pytest.raises(ValueError, match="Save only the state_dict"):
        load_weights(net(), tmp_path / "pickled.ckpt")


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.pt is damaged"):
        load_weights(net(), tmp_path / "half.pt")
