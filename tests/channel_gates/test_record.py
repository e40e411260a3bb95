"""Gates in files and checkpoints: what comes back in another process, and what a plain class is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.registry import exits, qat
from support.small import CLASSES, FEATURES, SmallModule, plain, quiet_trainer

from lightning_compress import ChannelGates, EarlyExitHeads, cut, load_compressed, save_compressed
from lightning_compress.channel_gates.gates import gates_of
from lightning_compress.core.records import KEY, RecordError

X = torch.zeros(2, FEATURES)


def fitted(module: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    wrapped = ChannelGates(module or SmallModule(), example_inputs=X, **options)
    for gate in gates_of(wrapped).by_layer().values():  # type: ignore[union-attr]
        torch.nn.init.normal_(gate.weight, std=0.3)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    return wrapped.eval()


def test_a_compressed_file_brings_the_gates_back(tmp_path: Path) -> None:
    wrapped = fitted(share=0.3)
    x = torch.randn(8, FEATURES)
    save_compressed(wrapped, tmp_path / "network.lc")
    loaded: Any = load_compressed(tmp_path / "network.lc", SmallModule()).eval()
    assert torch.equal(loaded(x), wrapped(x))
    again: Any = ChannelGates(loaded, example_inputs=X)
    gates = gates_of(again)
    assert gates is not None
    assert gates.share == 0.3
    torch.testing.assert_close(again.deploy(min_gain=None, example_inputs=x)(x), wrapped(x))
    quiet_trainer(max_epochs=1).fit(again, plain(0), plain(1))
    assert gates.share == 0.3


def test_gates_of_a_file_train_on_from_their_share_to_another_one(tmp_path: Path) -> None:
    save_compressed(fitted(share=0.5), tmp_path / "network.lc")
    loaded: Any = load_compressed(tmp_path / "network.lc", SmallModule())
    shares: list[float | None] = []

    again: Any = ChannelGates(loaded, share=0.25, end_epoch=1.0, example_inputs=X)
    again.net.norm.register_forward_hook(lambda *_: shares.append(gates_of(again).training_share))  # type: ignore[union-attr]
    quiet_trainer(max_epochs=2).fit(again, plain(0))
    assert shares == pytest.approx([max(0.25, 0.5 - 0.25 * step / 12) for step in range(24)])
    with pytest.raises(ValueError, match=r"has gates at net.conv, net.hidden already, and layers= says net.conv"):
        ChannelGates(again, layers=["net.conv"])


def test_a_cut_network_with_gates_exits_and_grids_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = SmallModule()
    cut(module, X, keep={"net.hidden": range(10), "net.conv": [0, 2, 5]})
    wrapped = exits().wrap(fitted(module))
    quiet_trainer(max_epochs=1, callbacks=qat(start_epoch=0.5).callbacks()).fit(wrapped, plain(0))
    wrapped.eval()
    save_compressed(wrapped, tmp_path / "network.lc")
    loaded: Any = load_compressed(tmp_path / "network.lc", SmallModule()).eval()
    x = torch.randn(8, FEATURES)
    assert torch.equal(loaded(x), wrapped(x))
    EarlyExitHeads(ChannelGates(loaded), None, num_classes=CLASSES, example_inputs=X)


def test_a_plain_class_loads_the_rest_strictly_and_is_told() -> None:
    wrapped = fitted()
    plain_module = SmallModule().eval()
    with pytest.warns(UserWarning, match="has loaded everything but the gates of channels at 'channel_gates'"):
        plain_module.load_state_dict(wrapped.state_dict())
    assert torch.equal(plain_module.net.head.weight, wrapped.net.head.weight)


def test_a_module_without_example_inputs_gets_the_gates_of_a_checkpoint() -> None:
    wrapped = fitted(share=0.3)
    late: Any = ChannelGates(SmallModule())
    assert gates_of(late) is None
    late.load_state_dict(wrapped.state_dict())
    x = torch.randn(3, FEATURES)
    assert torch.equal(late.eval()(x), wrapped(x))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("share", 2.0, "has a share 2.0"),
        ("layers", [["net.conv", "net.norm", 1, 6]], "which are no list of layers"),
        ("layers", [["net.conv", "net.norm", 1, "6", False]], "which are no list of layers"),
        (
            "layers",
            [["net.cnov", "net.norm", 1, 6, False]],
            "gates at 'net.cnov', which SmallModule does not",
        ),
    ],
)
def test_a_record_that_is_none_is_refused(field: str, value: Any, message: str) -> None:
    state = fitted().state_dict()
    state._metadata[""][KEY]["channel_gates"][field] = value
    late = ChannelGates(SmallModule())
    with pytest.raises(RecordError, match=message):
        late.load_state_dict(state)
    other: Any = ChannelGates(SmallModule(), ["net.hidden"], example_inputs=X)
    with pytest.raises(RecordError, match=r"The network was saved with gates at net.conv, net.hidden, and this one"):
        other.load_state_dict(fitted().state_dict())
