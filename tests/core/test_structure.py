"""A new kind of record needs a class and a line in the table; what a version does not know it refuses by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.load import adopt_state, follow_checkpoints
from lightning_compress.coding import CorruptFileError, load_compressed, save_compressed
from lightning_compress.coding.weights import load_weights
from lightning_compress.core.records import KEY, KINDS, RecordError, UnknownRecordError, records
from lightning_compress.core.structure import Arriving, Structure, follow, following, structures
from lightning_compress.quantization.input_grids import InputGrid, input_grids, quantize_inputs

GRID = InputGrid(0.25, 4, 3)
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Split(Structure):
    """Layers that were replaced by two factors, by name: the rank of each."""

    kind = "split"
    format = 2
    renames = True

    def write(self, module: nn.Module) -> Mapping[str, Any]:
        return {"ranks": {name: one[0].out_features for name, one in module.named_modules() if is_split(one)}}

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        for name, rank in record["ranks"].items():
            layer = dict(module.named_modules()).get(name)
            if not isinstance(layer, nn.Linear | nn.Sequential) or not isinstance(rank, int) or rank < 1:
                raise RecordError(f"No split of {name!r} leaves the rank {rank!r}.")

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        for name, rank in (record or {"ranks": {}})["ranks"].items():
            split(module, name, rank)


def is_split(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 2


def split(model: nn.Module, name: str, rank: int) -> None:
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        two = nn.Sequential(nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features))
        setattr(model, name, two)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return result


@pytest.fixture(autouse=True)
def _kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"split": f"{__name__}.Split"} | KINDS
    for module in ("records", "structure"):
        monkeypatch.setattr(f"lightning_compress.core.{module}.KINDS", kinds)


def changed() -> Net:
    """A network that was split, then cut, whose inputs are on grids: each kind needs the one before."""
    net = Net()
    split(net, "second", 4)
    Split().attach(net)
    cut(net, X, keep={"first": [0, 2, 3, 7, 9]})
    quantize_inputs(net, {"second.1": GRID})
    return net


def same_hooks(model: nn.Module) -> list[Any]:
    return [(dict(one._forward_pre_hooks), dict(one._load_state_dict_pre_hooks)) for one in model.modules()]


# ---------------------------------------------------------------------- a new kind


@pytest.mark.parametrize("form", ["compressed", "torch", "checkpoint"])
def test_a_new_kind_travels_with_the_others(form: str, tmp_path: Path) -> None:
    net = changed()
    if form == "compressed":
        save_compressed(net, tmp_path / "f")
    else:
        torch.save(net.state_dict() if form == "torch" else {"state_dict": net.state_dict()}, tmp_path / "f")
    loaded = load_compressed(tmp_path / "f", Net())
    assert torch.equal(loaded(X), net(X))
    assert loaded.first.out_features == 5
    assert input_grids(loaded) == {"second.1": GRID}
    again = Net()
    adopt_state(again, loaded.state_dict())  # what was rebuilt is written again
    assert torch.equal(again(X), net(X))


def test_a_part_takes_its_records_along() -> None:
    whole, net = nn.ModuleDict({"net": Net(), "other": nn.Linear(2, 2)}), changed()
    with following(whole["net"]):
        whole["net"].load_state_dict(net.state_dict())
    assert torch.equal(whole["net"](X), net(X))
    fresh = nn.ModuleDict({"net": Net(), "other": nn.Linear(2, 2)})
    adopt_state(fresh, whole.state_dict())
    assert torch.equal(fresh["net"](X), net(X))


def test_a_layer_that_is_the_whole_network_takes_its_record(tmp_path: Path) -> None:
    layer = nn.Linear(6, 2)
    quantize_inputs(layer, {"": GRID})
    save_compressed(layer, tmp_path / "f")
    loaded = load_compressed(tmp_path / "f", nn.Linear(6, 2))
    assert torch.equal(loaded(X), layer(X))


def test_a_layer_with_two_names_takes_its_record(tmp_path: Path) -> None:
    def make() -> nn.Module:
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.Tanh(), layer)

    net = make()
    quantize_inputs(net, {"0": GRID})
    save_compressed(net, tmp_path / "f")
    assert torch.equal(load_compressed(tmp_path / "f", make())(X), net(X))


# ---------------------------------------------------------------------- what is refused


def with_record(record: Any, path: str = "") -> dict[str, Tensor]:
    state: Any = copy.deepcopy(Net().state_dict())
    state._metadata[path][KEY] = record
    return state


UNKNOWN = {
    "kind": ({"twist": {"format": 1}}, r"kind 'twist' in format 1 for its module 'first'.*which does not know it"),
    "format": ({"split": {"format": 3}}, r"kind 'split' in format 3 for its module 'first'.*reads formats up to 2"),
    "cut": ({"cut": {"format": 2}}, r"kind 'cut' in format 2 .*This version of lightning_compress is \d.*up to 1"),
}


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize("way", ["compressed", "torch", "weights", "follow", "cut"])
def test_what_a_version_does_not_know_is_refused_by_name_and_never_as_corrupt(
    way: str, what: str, tmp_path: Path
) -> None:
    record, message = UNKNOWN[what]
    state, model = with_record(record, "first"), Net()
    save_compressed(state, tmp_path / "f")
    if way == "torch":
        torch.save(state, tmp_path / "f")
    if way in ("follow", "cut"):
        follow(model) if way == "follow" else follow_checkpoints(model)
    loads: dict[str, Callable[[], Any]] = {
        "weights": lambda: load_weights(model, tmp_path / "f"),
        "follow": lambda: model.load_state_dict(state),
        "cut": lambda: model.load_state_dict(state),
    }
    load = loads.get(way, lambda: load_compressed(tmp_path / "f", model))
    before, hooks = copy.deepcopy(model.state_dict()), same_hooks(model)
    with pytest.raises(UnknownRecordError, match=message) as raised:
        load()
    assert "corrupt" not in str(raised.value)
    assert not isinstance(raised.value, CorruptFileError)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert same_hooks(model) == hooks
    assert load_compressed(tmp_path / "f")._metadata["first"][KEY] == record  # the tensors can still be had


def test_a_plain_load_says_what_it_does_not_know() -> None:
    with pytest.warns(UserWarning, match=r"Net has loaded tensors alone\..*kind 'twist' in format 1"):
        Net().load_state_dict(with_record({"twist": {"format": 1}}))


WRONG = [None, 3, "x", [], {3: {}}, {"grid": None}, {"grid": {}}, {"grid": {"format": 0}}, {"grid": {"format": True}}]


@pytest.mark.parametrize("record", WRONG, ids=repr)
def test_a_record_that_no_version_writes_is_corrupt(record: Any, tmp_path: Path) -> None:
    state = with_record(record, "first")
    with pytest.raises(RecordError):
        records(state._metadata)  # type: ignore[attr-defined]
    save_compressed(state, tmp_path / "f")
    with pytest.raises(CorruptFileError):
        load_compressed(tmp_path / "f", Net())


HUGE = 10**5000  # Python does not print it
HUGE_RECORDS = {
    "format": {"grid": {"format": HUGE}},
    "scale": {"grid": {"format": 1, "scale": HUGE, "zero_point": HUGE, "bits": HUGE}},
    "dense shape": {
        "cut": {"format": 1, "numbers": {}, "buffers": {}, "dense_numbers": {}, "dense_shapes": {"": HUGE}}
    },
    "number": {
        "cut": {"format": 1, "numbers": {"": {"groups": HUGE}}, "buffers": {}, "dense_numbers": {}, "dense_shapes": {}}
    },
}


@pytest.mark.parametrize("what", HUGE_RECORDS)
def test_a_number_of_too_many_digits_to_print_is_corrupt(what: str, tmp_path: Path) -> None:
    save_compressed(with_record(HUGE_RECORDS[what], "first"), tmp_path / "f")
    with pytest.raises(CorruptFileError, match=r"too many digits|Exceeds"):
        load_compressed(tmp_path / "f", Net())


def test_a_record_of_a_layer_that_is_not_there_is_refused() -> None:
    state, model = with_record({}), Net()
    state._metadata["fourth"] = {KEY: {"sign": {"format": 1, "scale": True}}}  # type: ignore[attr-defined]
    follow(model)
    with pytest.raises(RecordError, match="'sign' is of 'fourth', which Net does not have"):
        model.load_state_dict(state)


def test_a_wrong_record_leaves_what_others_have_rebuilt_as_it_was() -> None:
    state = changed().state_dict()
    state._metadata["third"][KEY] = {"sign": {"format": 1}}  # the last kind
    model = Net()
    quantize_inputs(model, {"third": GRID})
    follow(model)
    names, hooks = list(model.state_dict()), same_hooks(model)
    expected, attached = model(X), [structures(one) for one in model.modules()]
    with pytest.raises(RecordError, match=r"record of the inputs of 'third' is not one that .* writes for a Linear"):
        model.load_state_dict(state)
    assert list(model.state_dict()) == names
    assert same_hooks(model) == hooks
    assert [structures(one) for one in model.modules()] == attached
    assert torch.equal(model(X), expected)


def test_what_is_removed_leaves_no_hook() -> None:
    model = Net()
    hooks = same_hooks(model)
    handles = [follow(model), *follow_checkpoints(model), quantize_inputs(model, {"first": GRID})]
    for handle in handles:
        handle.remove()
    assert same_hooks(model) == hooks
    assert not any(one._state_dict_hooks for one in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(Net().state_dict())
