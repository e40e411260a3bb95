"""Only the record of a cut explains other shapes, and it may only say what a cut does: else the model is as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.load import adopt_state, follow_checkpoints, follow_leader
from lightning_compress.coding import CorruptFileError, load_compressed, save_compressed
from lightning_compress.core.records import KEY, RecordError


class Net(nn.Module):
    """A convolution with groups, a norm without a weight, attention, a buffer that no state dict holds, and a path."""

    def __init__(self, width: int = 8, heads: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1, groups=2)
        self.group_norm = nn.GroupNorm(4, width)
        self.body = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, classes)
        self.register_buffer("scale", torch.arange(1.0, width + 1), persistent=False)
        self.cache_dir = "/safe"

    def forward(self, x: Tensor) -> Tensor:
        x = self.group_norm(self.conv(x)).mean((2, 3))
        x = self.norm(torch.relu(self.body(x)) * self.scale)
        y = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return self.head(self.drop(y))


def everything(model: nn.Module) -> dict[str, Any]:
    """All tensors, with their identities, and every plain attribute of every module."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path}: class"] = type(module)
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = list(value) if isinstance(value, dict) else copy.copy(value)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            found[f"{path}.{name}"] = None if tensor is None else (id(tensor), tensor.detach().clone())
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Tensor):
        return one[0] == other[0] and torch.equal(one[1], other[1])
    return bool(one == other)


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    now = everything(model)
    assert now.keys() == before.keys()
    assert [name for name in before if not same(now[name], before[name])] == []


# ---------------------------------------------------------------------- shapes without a record


def classes(number: int, width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, number))


def without_metadata(state: OrderedDict[str, Tensor]) -> dict[str, Tensor]:
    return dict(state)


@cache
def thin_classes(number: int, width: int = 16) -> OrderedDict[str, Tensor]:
    state: OrderedDict[str, Tensor] = cut(classes(number, width), torch.zeros(2, 8), keep={"0": [1, 2]}).state_dict()
    return state


OTHERS = {
    "fewer classes": lambda: classes(4).state_dict(),
    "more classes": lambda: classes(9).state_dict(),
    "narrower": lambda: classes(7, 12).state_dict(),
    "wider": lambda: classes(7, 20).state_dict(),
    "a key less": lambda: {name: one for name, one in classes(7).state_dict().items() if name != "2.bias"},
    "a key more": lambda: classes(7).state_dict() | {"3.bias": torch.ones(1)},
    "thin, a key less": lambda: {name: one for name, one in classes(4).state_dict().items() if name != "0.bias"},
    "another dimension": lambda: classes(7).state_dict() | {"0.bias": torch.ones(16, 1)},
    "thin without its record": lambda: without_metadata(thin_classes(7)),
    "a cut of another network": lambda: copy.deepcopy(thin_classes(4)),
    "a cut of a wider network": lambda: copy.deepcopy(thin_classes(7, 20)),
}


@pytest.mark.parametrize("form", ["compressed", "torch", "checkpoint"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_network_is_refused_as_torch_refuses_it(what: str, form: str, tmp_path: Path) -> None:
    state, model = OTHERS[what](), classes(7)
    with pytest.raises(RuntimeError):
        classes(7).load_state_dict(state)
    if form == "compressed":
        save_compressed(state, tmp_path / "f")
    else:
        torch.save(state if form == "torch" else {"state_dict": state}, tmp_path / "f")
    before = everything(model)
    with pytest.raises((ValueError, RuntimeError)):
        load_compressed(tmp_path / "f", model)
    assert_as_before(model, before)


@pytest.mark.parametrize("cut_before", [False, True])
@pytest.mark.parametrize("what", OTHERS)
def test_a_module_that_follows_checkpoints_refuses_another_network(what: str, cut_before: bool) -> None:
    model = classes(7)
    if cut_before:
        cut(model, torch.zeros(2, 8), keep={"0": [0, 3, 5]})
    else:
        follow_checkpoints(model)
    before = {name: tuple(one.shape) for name, one in model.named_parameters()}, model[0].out_features
    with pytest.raises((ValueError, RuntimeError)):
        model.load_state_dict(OTHERS[what]())
    assert ({name: tuple(one.shape) for name, one in model.named_parameters()}, model[0].out_features) == before


def test_a_copy_takes_the_shapes_of_its_leader_and_no_others() -> None:
    leader, average = classes(7), classes(7)
    follow_checkpoints(leader)
    follow_leader(average, leader)
    with pytest.raises(RuntimeError, match="size mismatch"):
        average.load_state_dict(classes(4).state_dict())
    assert average[2].out_features == 7
    thin = copy.deepcopy(thin_classes(7))
    for one in (leader, average):
        one.load_state_dict(thin)
    assert average[0].out_features == 2


def test_heads_of_another_network_with_the_same_shapes_are_refused() -> None:
    x = torch.zeros(2, 5, 8)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    thin = cut(layer, x, keep={"linear1": list(range(8))}).state_dict()
    thin._metadata[""][KEY]["cut"]["dense_numbers"]["self_attn"] = {"num_heads": 4}
    other = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = everything(other)
    with pytest.raises(ValueError, match=r"whose self_attn\.num_heads was 4 before, and that of this network is 2"):
        adopt_state(other, thin)
    assert_as_before(other, before)


def test_a_record_that_leaves_out_what_a_number_has_become_is_refused() -> None:
    attention = nn.MultiheadAttention(8, 4, batch_first=True)
    x = torch.zeros(2, 5, 8)
    whole = {"query": x, "key": x, "value": x, "need_weights": False}
    state = cut(attention, whole, keep={"in_proj_weight#2": [0]}).state_dict()
    del state._metadata[""][KEY]["cut"]["numbers"][""]["head_dim"]  # then the shapes are those of fewer heads as well
    dense = nn.MultiheadAttention(8, 4, batch_first=True)
    before = everything(dense)
    with pytest.raises(RecordError, match="says what 'head_dim' of '' was before the cut, and not what it is"):
        adopt_state(dense, state)
    assert_as_before(dense, before)


def test_a_module_on_the_meta_device_is_refused_and_not_left_empty(tmp_path: Path) -> None:
    save_compressed(classes(7), tmp_path / "f")
    with torch.device("meta"):
        model = classes(7)
    with pytest.raises(ValueError, match=r"is on the meta device, where 0\.bias, .* and 1 more can't hold values"):
        load_compressed(tmp_path / "f", model)


def test_a_lazy_module_takes_its_shapes_from_a_file_as_from_torch(tmp_path: Path) -> None:
    built = nn.Sequential(nn.Linear(3, 2))
    save_compressed(built, tmp_path / "f")
    lazy = load_compressed(tmp_path / "f", nn.Sequential(nn.LazyLinear(2)))
    assert torch.equal(lazy[0].weight, built[0].weight)


def test_an_error_in_the_users_own_loading_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Choosy(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            raise KeyError("scale")

    save_compressed(thin_classes(7), tmp_path / "f")
    model = classes(7)
    model[2] = Choosy(16, 7)
    before = everything(model)
    with pytest.raises(KeyError, match="scale"):
        load_compressed(tmp_path / "f", model)
    assert_as_before(model, before)


# ---------------------------------------------------------------------- what a record may say


@cache
def _thin_state() -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    thin = cut(Net(), torch.zeros(2, 2, 4, 4), keep={"body": [0, 3, 5, 6]}, allow_inexact=True)
    state: OrderedDict[str, Tensor] = thin.state_dict()
    return state


def thin_state() -> OrderedDict[str, Tensor]:
    return copy.deepcopy(_thin_state())


def test_the_record_of_this_network_is_followed(tmp_path: Path) -> None:
    state = thin_state()
    record = state._metadata[""][KEY]["cut"]
    assert record["numbers"]["norm"]["normalized_shape"] == (4,)
    assert record["buffers"] == {"scale": {0: [0, 3, 5, 6]}}
    save_compressed(state, tmp_path / "f")
    model = load_compressed(tmp_path / "f", Net())
    assert model.norm.normalized_shape == (4,)
    assert model.scale.tolist() == [1, 4, 6, 7]


WRONG: list[Any] = [None, True, -1, 0, 10**20, 1.5, "x", b"x", [], (), {}, [1, "x"], (0,), (99,), (4, 4), {"x": 1}]


def wrong_records() -> dict[str, tuple[tuple[Any, ...], Any]]:
    """By description the place in the record, and what stands there."""
    found: dict[str, tuple[tuple[Any, ...], Any]] = {}
    for value in WRONG:
        shown = repr(value)
        found[f"record {shown}"] = (), value
        for kind in ("numbers", "buffers", "dense_shapes", "dense_numbers"):
            if value != {}:
                found[f"{kind} {shown}"] = (kind,), value
            if value != {} or kind == "dense_shapes":
                found[f"{kind} of a module {shown}"] = (kind, {"dense_shapes": "body.weight"}.get(kind, "norm")), value
        if value != (0,):
            found[f"positions {shown}"] = ("buffers", "scale", 0), value
        for kind in ("numbers", "dense_numbers"):
            found[f"{kind}: normalized_shape {shown}"] = (kind, "norm", "normalized_shape"), value
            if not isinstance(value, int) or value < 1 or value > 4:
                found[f"{kind}: num_heads {shown}"] = (kind, "attention", "num_heads"), value
                found[f"{kind}: groups {shown}"] = (kind, "conv", "groups"), value
    for kind in ("numbers", "dense_numbers"):
        for module, name, value in (
            *(("", "cache_dir", "/etc"), ("", "cache_dir", 3), ("nope", "num_heads", 1), ("head", "num_heads", 1)),
            *(("drop", "p", 0.0), ("drop", "p", 1), ("drop", "training", False), ("body", "__class__", 3)),
            *(("body", "_parameters", {}), ("body", "__dict__", {}), ("conv", "padding", (9, 9)), ("", "forward", 1)),
            *(("conv", "stride", (4, 4)), ("conv", "kernel_size", (1, 1)), ("body", 3, 1), ("body", "weight", 1)),
        ):
            found[f"{kind}: {module}.{name} = {value!r}"] = (kind, module, name), value
    found["groups that do not divide the channels"] = ("numbers", "group_norm", "num_groups"), 3
    for name, value in (("nope", {0: [1]}), ("head.weight", {0: [1]}), ("scale", {3: [0]}), ("scale", {-1: [0]})):
        found[f"buffers: {name} {value}"] = ("buffers", name), value
    for positions in ([3, 0], [0, 0, 1, 2], [-1, 0], [0, 8], [True], ["0"], list(range(9))):
        found[f"positions {positions}"] = ("buffers", "scale", 0), positions
    for name, shape in (("nope.weight", (8, 8)), ("body.weight", (8, 8, 1)), ("body.weight", (1, 8)), ("scale", (8,))):
        found[f"dense shape of {name} {shape}"] = ("dense_shapes", name), shape
    found["another entry"] = ("attributes",), {}
    return found


@pytest.mark.parametrize("what", wrong_records())
@pytest.mark.parametrize("form", ["compressed", "checkpoint"])
def test_a_record_that_no_cut_leaves_is_refused_whole(what: str, form: str, tmp_path: Path) -> None:
    place, value = wrong_records()[what]
    state = thin_state()
    holder: Any = state._metadata[""]
    path = (KEY, "cut", *place)
    for key in path[:-1]:
        holder = holder.setdefault(key, {})
    holder[path[-1]] = value
    model = Net()
    if form == "compressed":
        save_compressed(state, tmp_path / "f")
        load, error = lambda: load_compressed(tmp_path / "f", model), CorruptFileError
    else:
        follow_checkpoints(model)
        load, error = lambda: model.load_state_dict(state), RecordError
    before = everything(model)
    with pytest.raises(error):
        load()
    assert_as_before(model, before)


def test_a_record_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    for kind in ("numbers", "buffers", "dense_shapes", "dense_numbers"):
        state = thin_state()
        del state._metadata[""][KEY]["cut"][kind]
        with pytest.raises(RecordError, match="and needs 'numbers', 'buffers', 'dense_shapes', 'dense_numbers'"):
            adopt_state(Net(), state)


# ---------------------------------------------------------------------- parts of one network


class Heads(nn.Module):
    """Attention whose code names all sizes, so that the numbers that follow a cut are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(2, 5, 8))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(Heads(), nn.Linear(8, 8)), nn.Sequential(Heads(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
WAYS = {  # by description, the parts that are cut one after the other, and whether the whole network is their owner
    "two parts of an owner": [("encoder", True), ("decoder", True)],
    "two parts by themselves": [("encoder", False), ("decoder", False)],
    "one of each": [("encoder", True), ("decoder", False)],
    "the other way round": [("encoder", False), ("decoder", True)],
    "a part twice": [("encoder", True), ("encoder", False)],
    "a part twice, by itself first": [("encoder", False), ("encoder", True)],
    "a part and the whole": [("encoder", True), ("", True)],
    "a part by itself and the whole": [("encoder", False), ("", True)],
}


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_state_of_parts_that_are_cut_in_turn_is_loaded_into_the_last_and_into_a_new_network(
    way: str, follows: bool
) -> None:
    torch.manual_seed(0)
    net = Parts()
    if follows:
        follow_checkpoints(net)
    states = [(copy.deepcopy(net.state_dict()), net(X))]
    for path, owned in WAYS[way]:
        part = net.get_submodule(path)
        names = [group.name for group in channel_groups(part, X).free() if group.size == 4]
        cut(part, X, remove={name: [1] for name in names[-1:]}, owner=net if owned else None)
        states.append((copy.deepcopy(net.state_dict()), net(X)))
    for state, expected in [*states, *states[::-1]]:
        fresh = Parts()
        adopt_state(fresh, state)
        torch.testing.assert_close(fresh(X), expected)
        if any(owned for _, owned in WAYS[way]) or follows:
            net.load_state_dict(state)
            torch.testing.assert_close(net(X), expected)


def test_a_part_that_was_learned_after_another_is_refused_in_shapes_that_no_cut_has() -> None:
    net = Parts()
    for path in ("encoder", "decoder"):
        part = net.get_submodule(path)
        names = [group.name for group in channel_groups(part, X).free() if group.size == 4]
        cut(part, X, remove={names[0]: [1]}, owner=net)
    state = net.state_dict()
    state["decoder.1.weight"] = torch.zeros(7, 8)
    with pytest.raises(ValueError, match=r"decoder\.1\.weight had shape \(7, 8\) before, and that of this network"):
        net.load_state_dict(state)
