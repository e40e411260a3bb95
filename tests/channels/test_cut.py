"""Channels leave in place: the same Parameters, the optimizer's state alike, and all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.channels.cut import cut, shrink
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.load import adopt_state, follow_checkpoints
from lightning_compress.coding import load_compressed

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KEEP = {"conv1": [0, 2, 5], "conv2": [1, 2, 3, 7], "body": [0, 4]}


class Net(nn.Module):
    """A conv net with all that has to follow: batch norms, a depthwise convolution, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Linear(8 * 16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.norm1(self.conv1(x))))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(torch.tanh(self.body(x.flatten(1))))


def make(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    net = Net().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net


def snapshot(net: nn.Module) -> tuple[dict[str, Tensor], list[Any]]:
    attributes = [{k: v for k, v in vars(one).items() if isinstance(v, int | tuple | bool)} for one in net.modules()]
    return {name: value.clone() for name, value in net.state_dict().items()}, attributes


def assert_untouched(net: nn.Module, before: tuple[dict[str, Tensor], list[Any]]) -> None:
    state, attributes = snapshot(net)
    assert all(torch.equal(state[name], value) for name, value in before[0].items())
    assert state.keys() == before[0].keys()
    assert attributes == before[1]
    assert not net._load_state_dict_pre_hooks


def test_parameters_modes_hooks_and_requires_grad_stay() -> None:
    net = make()
    net.norm1.eval()
    net.conv2.bias.requires_grad_(False)
    seen: list[tuple[int, ...]] = []
    net.body.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    before, modes = dict(net.named_parameters()), [one.training for one in net.modules()]
    assert cut(net, X, keep=KEEP) is net
    seen.clear()
    net(X)
    assert seen == [(4, 2)]
    assert [one.training for one in net.modules()] == modes
    assert all(before[name] is parameter for name, parameter in net.named_parameters())
    assert not net.conv2.bias.requires_grad
    assert (net.conv1.out_channels, net.depthwise.groups, net.depthwise.in_channels, net.conv2.in_channels) == (3,) * 4
    assert (net.norm2.num_features, net.body.in_features, net.body.out_features) == (4, 4 * 16, 2)


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_on_after_a_cut_equals_training_on_behind_masks(name: str) -> None:
    nets = [make(torch.float64), make(torch.float64)]
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in nets]
    x, y = torch.randn(60, 8, 3, 8, 8, dtype=torch.float64), torch.randint(4, (60, 8))
    groups = channel_groups(nets[0], x[0])
    masks = {key: torch.ones_like(value) for key, value in nets[0].named_parameters()}
    for group in groups.free():
        gone = torch.tensor([unit for unit in range(group.size) if unit not in KEEP[group.name]])
        for member in (one for one in group.members if one.produces):
            masks[member.tensor].index_fill_(member.dim, member.index[gone].flatten(), 0)

    def step(number: int, which: int) -> None:
        optimizers[which].zero_grad()
        F.cross_entropy(nets[which](x[number]), y[number]).backward()
        optimizers[which].step()
        if which == 0 and number >= 10:
            mask()

    @torch.no_grad()
    def mask() -> None:
        for key, parameter in nets[0].named_parameters():
            parameter.mul_(masks[key])

    for number in range(10):
        for which in (0, 1):
            step(number, which)
    mask()
    cut(nets[1], x[0], keep=KEEP, optimizers=optimizers[1:], groups=channel_groups(nets[1], x[0]))
    for number in range(10, 60):
        for which in (0, 1):
            step(number, which)
    cut(nets[0], x[0], keep=KEEP, groups=groups)
    for (key, masked), thin in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(masked, thin, rtol=1e-9, atol=1e-9, msg=key)


def test_factored_moments_follow() -> None:
    net = make()
    optimizer = torch.optim.Adafactor(net.parameters(), lr=0.01)
    F.cross_entropy(net(X), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state[net.body.weight])
    cut(net, X, keep=KEEP, optimizers=[optimizer])
    after = optimizer.state[net.body.weight]
    columns = (torch.tensor(KEEP["conv2"])[:, None] * 16 + torch.arange(16)).flatten()
    assert torch.equal(after["row_var"], before["row_var"][KEEP["body"]])
    assert torch.equal(after["col_var"], before["col_var"][:, columns])
    net.zero_grad()
    F.cross_entropy(net(X), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


def test_gradients_follow() -> None:
    net = make()
    net(X).sum().backward()
    expected = net.conv1.weight.grad[KEEP["conv1"]].clone()
    cut(net, X, keep=KEEP)
    assert torch.equal(net.conv1.weight.grad, expected)


def test_a_copy_is_cut_alike() -> None:
    net, average = make(), make()
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(2)
    cut(net, X, keep=KEEP, copies=[average])
    assert torch.equal(average.conv2.weight, 2 * net.conv2.weight)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"conv3": [0]}, "There is no channel group 'conv3'; there are 'conv1', 'conv2', 'body', 'head'"),
        ({"conv1": []}, "Nothing would be left of 'conv1': at least one of its 6 channels must stay"),
        ({"conv1": [0, 6]}, "keep for 'conv1' must lie in 0 to 5; got 0 to 6"),
        ({"conv1": [0.5]}, "must be indices"),
        ({"conv1": [True, False, True, True, True, True]}, "must be indices"),
        ({"head": [0, 1]}, "'head' cannot be cut: it is an output of the network"),
    ],
)
def test_what_cannot_be_cut_is_refused(keep: dict[str, Any], message: str) -> None:
    net = make()
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        cut(net, X, keep=keep)
    assert_untouched(net, before)


def test_what_stays_and_what_leaves_are_two_ways_to_say_the_same() -> None:
    leaves = {"conv1": [4, 1, 3], "conv2": torch.tensor([0, 4, 5, 6]), "body": [1, 2, 3, 5, 6, 7, 8, 9]}
    kept, removed = cut(make(), X, keep=KEEP), cut(make(), example_inputs=X, remove=leaves)
    for (name, one), (_, other) in zip(kept.named_parameters(), removed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert cut(net := make(), X, remove={"conv1": []}) is net
    assert net.conv1.out_channels == 6


@pytest.mark.parametrize(
    "call",
    [
        lambda net: cut(net, KEEP, X),
        lambda net: cut(net, KEEP, example_inputs=X),
        lambda net: cut(net, KEEP),
        lambda net: cut(net, X),
        lambda net: cut(net, keep=KEEP),
        lambda net: cut(net, X, example_inputs=X, keep=KEEP),
        lambda net: cut(net, X, keep=KEEP, remove=KEEP),
        lambda net: cut(net, X, KEEP, remove=KEEP),
    ],
)
def test_a_cut_that_does_not_say_which_side_stays_is_refused(call: Callable[[nn.Module], nn.Module]) -> None:
    net = make()
    before = snapshot(net)
    with pytest.raises(TypeError, match=r"cut\(model, example_inputs, keep=\{.*cut\(model, example_inputs, remove=\{"):
        call(net)
    assert_untouched(net, before)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ({"conv1": range(6)}, "Nothing would be left of 'conv1': at least one of its 6 channels must stay"),
        ({"conv1": [-1, 2]}, "remove for 'conv1' must lie in 0 to 5; got -1 to 2"),
        ({"head": [0]}, "'head' cannot be cut: it is an output of the network"),
    ],
)
def test_what_cannot_be_removed_is_refused(remove: dict[str, Any], message: str) -> None:
    net = make()
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        cut(net, X, remove=remove)
    with pytest.raises(TypeError, match="remove must be a dict"):
        cut(net, X, remove=[0, 1])
    assert_untouched(net, before)


def test_inexact_groups_need_a_word() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"layer_norm in '1' averages over channels: pass allow_inexact=True"):
        cut(net, torch.randn(2, 4), keep={"0": [0, 1]})
    assert_untouched(net, before)
    assert cut(net, torch.randn(2, 4), keep={"0": [0, 1]}, allow_inexact=True)[1].normalized_shape == (2,)


def test_an_optimizer_that_cannot_follow_stops_the_cut() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["sketch"] = torch.zeros(7)
            return super().step(closure)

    net = make()
    optimizer = Odd(net.parameters(), lr=0.1)
    net(X).sum().backward()
    optimizer.step()
    net.zero_grad()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"Odd keeps 'sketch' of shape \(7,\)"):
        cut(net, X, keep=KEEP, optimizers=[optimizer])
    assert_untouched(net, before)


def test_code_that_computes_something_else_undoes_the_cut() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h) + (1.0 if h.shape[-1] == 3 else 0.0)

    net = Moody()
    groups = channel_groups(net, torch.randn(2, 4))
    (free,) = [group for group in groups if group.name == "first"]
    assert free.frozen is not None
    assert "does not survive a cut" in free.frozen


def test_shrink_takes_what_is_masked_and_nothing_else() -> None:
    net = make()
    with torch.no_grad():
        for tensor in (net.conv1.weight, net.conv1.bias, net.norm1.weight, net.norm1.bias, net.depthwise.weight):
            tensor[[1, 3, 4]] = 0
        net.conv2.weight[0] = 0  # its bias still speaks
    expected = copy.deepcopy(net).eval()(X)
    shrink(net, X)
    assert (net.conv1.out_channels, net.conv2.out_channels) == (3, 8)
    torch.testing.assert_close(net.eval()(X), expected)
    before = {name: id(value) for name, value in net.named_parameters()}
    shrink(net, X)  # nothing is left to do
    assert {name: id(value) for name, value in net.named_parameters()} == before


def test_a_group_that_is_masked_as_a_whole_is_refused() -> None:
    net = make()
    with torch.no_grad():
        net.body.weight.zero_()
        net.body.bias.zero_()
    before = snapshot(net)
    with pytest.raises(ValueError, match="All channels of 'body' are masked"):
        shrink(net, X)
    assert_untouched(net, before)


def test_a_network_that_cannot_be_exported_is_refused_by_name() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Branching cannot be exported, so its channel groups cannot be found"):
        channel_groups(Branching(), torch.randn(2, 4))


# ---------------------------------------------------------------------- shapes follow what is loaded


def test_thin_and_dense_state_dicts_load_into_a_cut_module() -> None:
    net, dense = make(), make()
    wide = copy.deepcopy(net.state_dict())
    cut(net, X, keep=KEEP)
    thin = copy.deepcopy(net.state_dict())
    expected = net.eval()(X)
    net.load_state_dict(wide)
    assert net.depthwise.groups == 6
    torch.testing.assert_close(net(X), dense.eval()(X))
    net.load_state_dict(thin)
    assert net.depthwise.groups == 3
    torch.testing.assert_close(net(X), expected)


def test_a_thin_file_rebuilds_the_dense_class(tmp_path: Any) -> None:
    net = cut(make(), X, keep=KEEP).eval()
    torch.save(net.state_dict(), tmp_path / "thin.pt")
    other = Net().eval()
    adopt_state(other, torch.load(tmp_path / "thin.pt", weights_only=True))
    torch.testing.assert_close(other(X), net(X))


def test_shapes_that_fit_no_cut_are_refused() -> None:
    net = cut(make(), X, keep=KEEP)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = copy.deepcopy(net.state_dict())
    state["norm1.weight"] = torch.ones(4)
    with pytest.raises(ValueError, match="which is no cut of 'conv1'"):
        net.load_state_dict(state)
    state = copy.deepcopy(net.state_dict())
    state["conv1.weight"] = torch.ones(3, 3, 5, 5)
    with pytest.raises(ValueError, match="no cut of its channels leads from one to the other"):
        net.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_heads_are_told_by_the_record() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0).eval()
    net = nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 2)).eval()
    x = torch.randn(2, 7, 5)
    heads = next(group for group in channel_groups(net, x).free() if group.size == 3)
    cut(net, x, keep={heads.name: [0, 2]})
    state = copy.deepcopy(net.state_dict())
    again = nn.Sequential(
        nn.Linear(5, 12), nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0), nn.Linear(12, 2)
    ).eval()
    adopt_state(again, state)
    torch.testing.assert_close(again(x), net(x))
    del state._metadata
    with pytest.raises(ValueError, match="no record of what goes with them"):
        net.load_state_dict(state)


# ---------------------------------------------------------------------- buffers that no state dict holds


class Scaled(nn.Module):
    """A channel-sized table that the constructor makes and no state dict holds, and one row of it per channel."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.register_buffer("scale", torch.arange(1.0, width + 1), persistent=False)
        self.register_buffer("shift", torch.arange(2.0 * width).view(2, width).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * self.scale * self.shift[1])


POINTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_a_thin_file_slices_the_buffers_that_it_does_not_hold(tmp_path: Any) -> None:
    thin = cut(Scaled(), POINTS, keep={"first": [0, 3, 5]})
    torch.save(thin.state_dict(), tmp_path / "thin.pt")
    other = load_compressed(tmp_path / "thin.pt", Scaled())
    assert other.scale.tolist() == [1, 4, 6]
    assert other.shift.tolist() == [[0, 3, 5], [6, 9, 11]]
    assert torch.equal(other(POINTS), thin(POINTS))


def test_two_cuts_in_a_row_count_from_the_dense_buffer() -> None:
    thin = cut(Scaled(), POINTS, keep={"first": [0, 3, 5]})
    cut(thin, POINTS, keep={"first": [1, 2]})
    other = Scaled()
    adopt_state(other, thin.state_dict())
    assert other.scale.tolist() == thin.scale.tolist() == [4, 6]
    assert torch.equal(other(POINTS), thin(POINTS))


def test_buffers_come_back_with_a_dense_state_dict() -> None:
    net = Scaled()
    wide, dense = copy.deepcopy(net.state_dict()), net(POINTS)
    thin = copy.deepcopy(cut(net, POINTS, keep={"first": [0, 3, 5]}).state_dict())
    expected = net(POINTS)
    for _ in range(2):
        net.load_state_dict(wide)
        assert torch.equal(net(POINTS), dense)
        net.load_state_dict(thin)
        assert torch.equal(net(POINTS), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "file"])
def test_a_thin_network_that_was_copied_is_cut_again_and_saved(way: str, tmp_path: Any) -> None:
    net = Scaled()
    wide, dense = copy.deepcopy(net.state_dict()), net(POINTS)
    cut(net, POINTS, keep={"first": [0, 3, 5]})
    if way == "deepcopy":
        other = copy.deepcopy(net)
    elif way == "pickle":
        torch.save(net, tmp_path / "net.pt")
        other = torch.load(tmp_path / "net.pt", weights_only=False)
    else:
        torch.save(net.state_dict(), tmp_path / "net.pt")
        other = load_compressed(tmp_path / "net.pt", Scaled())
    cut(other.double(), POINTS.double(), keep={"first": [2]})
    again = Scaled().double()
    adopt_state(again, copy.deepcopy(other.state_dict()))
    assert again.scale.tolist() == [6]
    assert torch.equal(again(POINTS.double()), other(POINTS.double()))
    assert net.scale.tolist() == [1, 4, 6]
    other.load_state_dict(wide)
    torch.testing.assert_close(other.float()(POINTS), dense)


def test_a_cut_that_is_undone_leaves_no_trace_of_its_buffers() -> None:
    net = Scaled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net.last.weight] = {"sketch": torch.zeros(7)}
    with pytest.raises(ValueError, match="'sketch'"):
        cut(net, POINTS, keep={"first": [0, 3, 5]}, optimizers=[optimizer])
    assert net.scale.tolist() == [1, 2, 3, 4, 5, 6]
    assert not [name for name in vars(net) if "dense" in name]


def test_a_thin_state_dict_without_its_record_is_refused_for_its_buffers() -> None:
    net = cut(Scaled(), POINTS, keep={"first": [0, 3, 5]})
    bare = dict(net.state_dict())
    for load in (net.load_state_dict, lambda state: adopt_state(Scaled(), state)):
        with pytest.raises(ValueError, match=r"no record of what goes with them \(.*s[ch].*its metadata was lost"):
            load(bare)


def test_best_weights_that_are_kept_by_hand_go_back_into_a_thin_network_whose_shapes_tell_everything() -> None:
    """Without metadata, as `{name: value.clone()}` of a loop by hand has it, a norm's shape is that of its weight."""
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    cut(net, POINTS, keep={"0": [0, 3, 5]}, allow_inexact=True)
    best, expected = {name: value.clone() for name, value in net.state_dict().items()}, net(POINTS)
    with torch.no_grad():
        net[0].weight.zero_()
    net.load_state_dict(best)
    assert torch.equal(net(POINTS), expected)


def test_a_file_of_another_network_is_refused_by_its_dense_shapes() -> None:
    state = cut(Scaled(9), POINTS, keep={"first": [0, 3, 5]}).state_dict()
    other = Scaled()
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"its first\.weight had shape \(9, 3\) before.*this network has \(6, 3\)"):
        adopt_state(other, state)
    assert_untouched(other, before)
    assert other.scale.shape == (6,)


# ---------------------------------------------------------------------- the record


def test_a_network_that_was_not_cut_leaves_no_record() -> None:
    net = make()
    bare = copy.deepcopy(net.state_dict()._metadata)
    follow_checkpoints(net, channel_groups(net, X))
    assert net.state_dict()._metadata == bare
    wide = copy.deepcopy(net.state_dict())
    cut(net, X, keep=KEEP)
    assert net.state_dict()._metadata != bare
    net.load_state_dict(wide)
    assert net.state_dict()._metadata == bare


def test_another_process_goes_on_where_the_first_one_was(tmp_path: Any) -> None:
    net = make().eval()
    states, outputs = [copy.deepcopy(net.state_dict())], [net(X)]
    for keep in (KEEP, {"conv2": [1, 3]}, {"conv1": [2]}):
        cut(net, X, keep=keep)
        states.append(copy.deepcopy(net.state_dict()))
        outputs.append(net(X))
    for first in (1, 2, 3):  # what the new process starts from
        torch.save(states[first], tmp_path / "thin.pt")
        other = load_compressed(tmp_path / "thin.pt", Net().eval())
        cut(other, X, keep={"body": [1]})  # the groups that it finds are those of the thin network
        for state, output in zip(states, outputs, strict=True):
            other.load_state_dict(state)
            torch.testing.assert_close(other(X), output)


def test_a_part_that_was_cut_by_itself_lies_in_the_whole() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.top = Scaled(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.part(x))

    whole = Whole()
    wide, dense = copy.deepcopy(whole.state_dict()), whole(POINTS)
    cut(whole.part, POINTS, keep={"first": [0, 3, 4, 5]})
    cut(whole, POINTS, keep={"part.first": [1, 3]})
    other = Whole()
    adopt_state(other, copy.deepcopy(whole.state_dict()))
    assert other.part.scale.tolist() == [4, 6]
    assert torch.equal(other(POINTS), whole(POINTS))
    for one in (whole, other):
        one.load_state_dict(wide)
        assert torch.equal(one(POINTS), dense)


def test_the_owner_takes_the_shapes_of_what_is_loaded_into_it() -> None:
    owner = nn.ModuleDict({"net": Scaled(), "other": nn.Linear(2, 2)})
    wide = copy.deepcopy(owner.state_dict())
    cut(owner["net"], POINTS, keep={"first": [0, 3, 5]}, owner=owner)
    assert "lightning_compress.structure" in owner.state_dict()._metadata[""]
    part = Scaled()  # the network is a part of the owner, and may be saved by itself
    adopt_state(part, owner["net"].state_dict())
    assert torch.equal(part(POINTS), owner["net"](POINTS))
    owner.load_state_dict(wide)
    assert owner["net"].scale.shape == (6,)
    assert not owner["net"].state_dict()._metadata[""].keys() - {"version"}


def test_a_loaded_network_draws_the_same_random_numbers() -> None:
    def layer() -> nn.TransformerEncoderLayer:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)

    def trained(net: nn.Module) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = net.train()(torch.ones(3, 4, 8))
        return out

    for name in ("linear1", "self_attn.in_proj_weight"):  # the attention is left alone, and cut
        net, other = layer(), layer()
        cut(net, torch.randn(3, 4, 8), keep={name: [1]})
        adopt_state(other, net.state_dict())
        assert [type(one) for one in other.modules()] == [type(one) for one in net.modules()]
        assert torch.equal(trained(other), trained(net))


class Tied(nn.Module):
    """A layer that is called twice and has two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(3, 6), nn.Linear(6, 6)
        self.again, self.out, self.tied, self.head = self.body, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.tied.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.again(torch.relu(self.body(torch.relu(self.first(x))))))
        return self.head(torch.relu(self.tied(torch.relu(self.out(x)))))


@pytest.mark.parametrize("path", ["", "net"])
def test_weights_with_several_names_follow_checkpoints(path: str) -> None:
    net = Tied()
    owner: nn.Module = net
    if path:
        owner = nn.Module()
        owner.early, owner.net = net.tied, net  # the first name of all is none of the network's own
    x = torch.randn(4, 3)
    wide, dense = copy.deepcopy(owner.state_dict()), net(x)
    cut(net, x, keep={"first": [0, 3, 4]}, owner=owner)
    narrow, expected = copy.deepcopy(owner.state_dict()), net(x)
    owner.load_state_dict(wide)
    assert torch.equal(net(x), dense)
    owner.load_state_dict(narrow)
    assert torch.equal(net(x), expected)
    assert net.tied.weight is net.out.weight


@pytest.mark.parametrize(
    "within",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_a_network_is_cut_alike_and_trained_on_whatever_is_on_around(within: Callable[[], Any]) -> None:
    expected, net = cut(make(), X, keep=KEEP), make()
    with within():
        net(X)  # autocast keeps what it has cast
        cut(net, X, keep=KEEP)
        assert net(X).shape == (4, 4)
    assert torch.equal(net(X), expected(X))
    net(X).sum().backward()
    assert net.conv1.weight.grad is not None


def test_shapes_that_are_loaded_in_inference_mode_can_be_trained() -> None:
    thin, net = cut(make(), X, keep=KEEP), make()
    with torch.inference_mode():
        adopt_state(net, thin.state_dict())
    net(X).sum().backward()
    assert torch.equal(net(X), thin(X))


def test_indices_may_be_a_set() -> None:
    assert torch.equal(cut(make(), X, keep={"body": {8, 1}})(X), cut(make(), X, keep={"body": [1, 8]})(X))
