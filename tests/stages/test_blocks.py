"""Blocks of networks of which they are known, against the same networks with the branches left out by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.zoo import ZOO, Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.baselines.networks import ResNet20
from lightning_compress.core.hooks import hooked
from lightning_compress.stages.blocks import Block, chosen_blocks, find_blocks
from lightning_compress.stages.branch_hooks import gated


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Basic(nn.Module):
    """A block of a ResNet, with one ReLU for all, which works in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None if inputs == outputs else conv(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class PreActivation(nn.Module):
    """The ReLU works in place on what the shortcut reads, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1, self.conv2 = nn.BatchNorm2d(width), conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(x)
        return x + self.conv2(F.relu(self.conv1(self.bn1(x)))) * 0.5


class Excite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]


class Excited(nn.Module):
    """A factor of the branch is computed of the branch itself, by a layer or not."""

    def __init__(self, width: int, layer: bool) -> None:
        super().__init__()
        self.body, self.excite = nn.Sequential(conv(width, width), nn.SiLU(), conv(width, width)), Excite(width)
        self.scale, self.layer = nn.Parameter(torch.rand(width, 1, 1)), layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + self.scale * (self.excite(y) if self.layer else self.excite.forward(y))


class Attends(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) + bias).softmax(-1)
        return self.out(scores @ v), scores


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Parallel(nn.Module):
    """Attention and MLP read one norm, and are added to each other before they are added to x."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp, self.first = nn.LayerNorm(width), Attends(width), mlp(width), first
        self.bias = nn.Parameter(torch.randn(1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed, through = self.attn(y, self.bias)[0], self.mlp(y)
        return x + mixed + through if self.first else mixed + through + x


class Embedded(nn.Module):
    """Tokens and positions, of which one is computed, are no block; what follows is one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.token, self.position, self.mixed = nn.Embedding(11, 6), nn.Embedding(5, 6), nn.Linear(6, 6)
        self.block, self.head = block, nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.mixed(self.token(tokens)) + self.position(positions)
        return self.head(self.block(x)[:, 0])


class UNet(nn.Module):
    """Blocks in the arms of a sum over two scales, which is a block as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 4), conv(4, 6, stride=2)
        self.deep = nn.Sequential(conv(6, 6), nn.ReLU())
        self.top = nn.Sequential(conv(4, 4), nn.ReLU())
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, 2), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.top(x)
        y = self.down(x)
        y = y + self.deep(y)
        return self.out(x + self.up(y))


class Pyramid(nn.Module):
    """The sums over scales of a feature pyramid are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.l1, self.l2 = conv(3, 4, stride=2), conv(4, 4, stride=2), conv(4, 5, 1), conv(4, 5, 1)
        self.o1, self.o2 = conv(5, 2), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.c1(x).relu()
        two = self.c2(one).relu()
        p2 = self.l2(two)
        p1 = self.l1(one) + F.interpolate(p2, scale_factor=2.0)
        return self.o1(p1).mean((2, 3)) + self.o2(p2).mean((2, 3))


class Inverted(nn.Module):
    """A block of MobileNet-v3 and EfficientNet: expansion, depthwise, squeeze and excitation, projection; in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        wide = 2 * inputs
        self.same = inputs == outputs and stride == 1
        self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1), nn.BatchNorm2d(wide), nn.Hardswish(inplace=True))
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 2, 1), nn.Conv2d(2, wide, 1)
        self.project, self.drop = nn.Sequential(nn.Conv2d(wide, outputs, 1), nn.BatchNorm2d(outputs)), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.depthwise(self.expand(x)), inplace=True)
        y *= F.hardsigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu_()))
        y = self.drop(self.project(y))
        if self.same:
            y += x
        return y


def sequence(*blocks: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(conv(3, width), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))


def without_basic(block: nn.Module, x: Tensor) -> Tensor:
    return F.relu(x if block.down is None else block.down(x))


IMAGE, TOKENS = (3, 3, 8, 8), (3, 5)


class Known:
    """A network, the names of its blocks and of others, and what is left of it without them, written by hand."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        shape: tuple[int, ...],
        blocks: list[str],
        without: Callable[[Any, Tensor], Tensor],
        others: list[str] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(shape, dtype=torch.double) if len(shape) != 2 else torch.randint(11, shape)
        network = make()
        network(self.x if len(shape) == 2 else self.x.float())
        self.network = network.double().eval()
        self.blocks, self.others, self.without = blocks, others or [], without
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)


KNOWN: dict[str, Callable[[], Known]] = {
    "resnet": lambda: Known(
        lambda: sequence(Basic(4, 4), Basic(4, 6, 2), Basic(6, 6)),
        IMAGE,
        ["1", "3"],
        lambda m, x: m[4:](without_basic(m[3], m[2](without_basic(m[1], m[0](x))))),
        ["2"],
    ),
    "pre-activation": lambda: Known(
        lambda: sequence(PreActivation(4), PreActivation(4)), IMAGE, ["1", "2"], lambda m, x: m[3:](m[0](x).relu())
    ),
    "squeeze and excite": lambda: Known(
        lambda: sequence(Excited(4, layer=True)), IMAGE, ["1"], lambda m, x: m[2:](m[0](x))
    ),
    "inverted": lambda: Known(
        lambda: sequence(Inverted(4, 4), Inverted(4, 6, 2), Inverted(6, 6), Inverted(6, 6, 2), Inverted(6, 6)),
        IMAGE,
        ["1", "3", "5"],
        lambda m, x: m[6:](m[4](m[2](m[0](x)))),
    ),
    "parallel": lambda: Known(
        lambda: Embedded(Parallel(6, first=True)), TOKENS, ["block.attn", "block.mlp"], without_embedded
    ),
    "parallel, added first": lambda: Known(
        lambda: Embedded(Parallel(6, first=False)), TOKENS, ["block.attn", "block.mlp"], without_embedded
    ),
    "no block": lambda: Known(lambda: sequence(conv(4, 4), nn.ReLU()), IMAGE, [], lambda m, x: m(x)),
    "pyramid": lambda: Known(Pyramid, IMAGE, [], lambda m, x: m(x)),
    "u-net": lambda: Known(
        UNet, IMAGE, ["top.0", "deep.0"], lambda m, x: m.out((y := m.stem(x)) + m.up(m.down(y))), others=["up"]
    ),
    "one layer": lambda: Known(
        lambda: Net(
            lambda m, x: m.b(2.0 * m.a(x).unflatten(-1, (2, 2)).flatten(-2) + x), a=nn.Linear(4, 4), b=nn.Linear(4, 2)
        ),
        (3, 4, 4),
        ["a"],
        lambda m, x: m.b(x),
    ),
}


def without_embedded(m: Any, x: Tensor) -> Tensor:
    embedded = m.mixed(m.token(x)) + m.position.weight
    return m.head(embedded[:, 0])


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_are_those_that_are_known(name: str) -> None:
    known = KNOWN[name]()
    found = find_blocks(known.network, known.x)
    assert [block.name for block in found.blocks] == known.blocks
    assert set(known.others) <= {block.name for block in found.others}
    for other in found.others:
        assert found.refused[other.name].endswith("it is taken when it is named")
    got = zeroed(known.network, found.blocks, known.x)
    expected = known.without(known.network, known.x)
    assert float((got - expected).abs().max()) <= 1e-12


def zeroed(network: nn.Module, blocks: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), hooked(*gated(network, blocks, lambda k, x: torch.zeros(len(x)))):
        return network(x)


def test_what_blocks_consist_of() -> None:
    known = KNOWN["resnet"]()
    first, last = find_blocks(known.network, known.x).blocks
    assert first == Block(
        "1", "identity", "1.conv1", "1.bn2", ("1.conv1", "1.bn1", "1.conv2", "1.bn2"), 2 * 9 * 16 * 64
    )
    assert last.macs == 2 * 9 * 36 * 16
    mine, theirs = find_blocks(KNOWN["parallel"]().network, KNOWN["parallel"]().x).blocks
    assert (mine.reads, mine.ends, mine.modules) == ("block.norm", "block.attn", ("block.attn",))
    assert (theirs.reads, theirs.ends, theirs.modules) == ("block.norm", "block.mlp", ("block.mlp",))
    assert mine.macs == 5 * 6 * 18 + 2 * 5 * 5 * 6 + 5 * 6 * 6


def test_what_is_named_is_taken() -> None:
    known = KNOWN["resnet"]()
    found = find_blocks(known.network, known.x)
    assert [one.name for one in chosen_blocks(found, None)] == ["1", "3"]
    assert [one.name for one in chosen_blocks(found, ["3", "2"])] == ["2", "3"]
    assert [one.name for one in chosen_blocks(found, ["*"])] == ["1", "2", "3"]
    (projection,) = chosen_blocks(found, ["2"])
    m = known.network
    expected = m[3:](without_basic(m[2], m[:2](known.x)))
    assert float((zeroed(m, [projection], known.x) - expected).abs().max()) <= 1e-12
    with pytest.raises(ValueError, match="There is no block '7'"):
        chosen_blocks(found, ["7"])
    known = KNOWN["u-net"]()
    found = find_blocks(known.network, known.x)
    with pytest.raises(ValueError, match="overlap"):
        chosen_blocks(found, ["deep.0", "up"])
    nothing = find_blocks(KNOWN["pyramid"]().network, KNOWN["pyramid"]().x)
    with pytest.raises(ValueError, match="no residual block"):
        chosen_blocks(nothing, None)


class Shared(nn.Module):
    """One layer that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.layer(x)
        return self.out(x)


def test_what_hooks_cannot_see_is_refused() -> None:
    found = find_blocks(Shared(), torch.randn(3, 4))
    assert not found.blocks
    assert sorted(found.refused) == ["layer", "layer:2", "layer:3"]
    assert "runs 3 times" in found.refused["layer"]
    found = find_blocks(nn.Sequential(conv(3, 4), Excited(4, layer=False)), torch.randn(IMAGE))
    assert "no layer returns its end" in found.refused["1"]


class Gates:
    """Decisions that depend on what a block reads."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []

    def __call__(self, k: int, x: Tensor) -> Tensor | None:
        self.seen.append((k, x))
        return x.detach().flatten(1).mean(1).sigmoid() if k else None


def by_hand(m: Any, x: Tensor) -> Tensor:
    """Two blocks of a ResNet, of which the second is multiplied by the factors of `Gates`."""
    x = m[1](m[0](x))
    block = m[2]
    y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    return m[3:](F.relu(x + x.detach().flatten(1).mean(1).sigmoid()[:, None, None, None] * y))


@pytest.fixture
def pair() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    network = sequence(Basic(4, 4), Basic(4, 4))
    network(x)
    return network.eval(), x


def test_gradients_are_those_of_the_network_by_hand(pair: tuple[nn.Module, Tensor]) -> None:
    network, x = pair
    gates = Gates()
    handles = gated(network, find_blocks(network, x).blocks, gates)
    got = network(x) + network(x.flip(0)).flip(0)  # twice in one step
    mine = torch.autograd.grad(got.square().sum(), list(network.parameters()))
    for handle in handles:
        handle.remove()
    assert [k for k, _ in gates.seen] == [0, 1] * 2
    assert torch.equal(gates.seen[1][1], network[:2](x))
    expected = by_hand(network, x) + by_hand(network, x.flip(0)).flip(0)
    theirs = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    assert torch.allclose(got, expected, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_gradients_compute_again(pair: tuple[nn.Module, Tensor], reentrant: bool) -> None:
    network, x = pair
    blocks = find_blocks(network, x).blocks
    x = x.requires_grad_()

    def again(x: Tensor, *, whole: bool) -> Tensor:
        x = network[1](network[0](x))
        block = network[2]
        if whole:
            return network[3:](checkpoint(block, x, use_reentrant=reentrant))
        y = block.bn1(block.conv1(x))
        y = checkpoint(lambda y: block.bn2(block.conv2(F.relu(y))), y, use_reentrant=reentrant)
        return network[3:](F.relu(x + y))

    expected = torch.autograd.grad(by_hand(network, x).square().sum(), [network[2].conv1.weight, x])
    with hooked(*gated(network, blocks, Gates())):
        for whole in (True, False):
            network.zero_grad()
            x.grad = None
            again(x, whole=whole).square().sum().backward()
            for one, other in zip([network[2].conv1.weight.grad, x.grad], expected, strict=True):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


class Host(nn.Module):
    """Has its own gate, as a network with gates has."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.gate = network, nn.Linear(4, 1)

    def decide(self, k: int, x: Tensor) -> Tensor:
        return self.gate(x.mean((2, 3)))[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_copies_have_gates_of_their_own(pair: tuple[nn.Module, Tensor]) -> None:
    network, x = pair
    host = Host(network)
    gated(network, find_blocks(network, x).blocks, host.decide)
    before = host(x)
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert torch.equal(other(x), before)
        nn.init.zeros_(other.gate.weight)
        nn.init.zeros_(other.gate.bias)
        assert not torch.allclose(other(x), before)
        assert torch.equal(host(x), before)


def test_half_precision_and_memory_formats(pair: tuple[nn.Module, Tensor]) -> None:
    network, x = pair
    blocks = find_blocks(network, x).blocks
    with hooked(*gated(network, blocks, lambda k, x: torch.ones(len(x)))), torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(x)
        assert float((found - expected).abs().max()) < 0.1
        seen: list[Tensor] = []
        with hooked(network[2].bn2.register_forward_hook(lambda _m, _a, output: seen.append(output))):
            assert torch.allclose(network(x.to(memory_format=torch.channels_last)), expected, atol=1e-5)
        assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_factors_of_another_number_of_samples_are_refused(pair: tuple[nn.Module, Tensor]) -> None:
    network, x = pair
    gated(network, find_blocks(network, x).blocks, lambda k, x: torch.ones(1))
    with pytest.raises(ValueError, match="pass one for each of the 3 samples"):
        network(x)


def test_resnet20() -> None:
    torch.manual_seed(0)
    network, x = ResNet20(width=4).double().eval(), torch.randn(3, 3, 16, 16, dtype=torch.double)
    found = find_blocks(network, x)
    assert [one.name for one in found.blocks] == [f"stages.{i}.{j}" for i in range(3) for j in range(3) if j or not i]
    assert sorted(one.name for one in found.others) == ["stages.1.0", "stages.2.0"]
    with torch.no_grad():
        hidden = network.relu(network.bn(network.conv(x)))
        for stage in network.stages[1:]:
            hidden = stage[0](hidden)
        expected = network.fc(hidden.mean((2, 3)))
    assert float((zeroed(network, found.blocks, x) - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize(("name", "blocks"), [("llama", 4), ("regnet", 0)])
def test_networks_of_transformers(name: str, blocks: int) -> None:
    network, x = ZOO[name].make().eval(), ZOO[name].inputs()
    found = find_blocks(network, x)
    assert len(found.blocks) == blocks
    assert len(found.others) == (2 if name == "regnet" else 0)


def test_a_network_that_was_compiled_in_place_has_the_same_blocks() -> None:
    network, x = nn.Sequential(conv(3, 4), Basic(4, 4), Basic(4, 4)), torch.randn(3, 3, 8, 8)
    expected = find_blocks(network, x)
    assert [block.name for block in expected.blocks] == ["1", "2"]
    network.compile(backend="eager")
    network(x)  # so that there is compiled code
    assert find_blocks(network, x) == expected
