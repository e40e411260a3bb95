from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.baselines import MSDNet, MSDNetClassifier, msdnet_classifier
from lightning_compress.channels.cut import shrink
from lightning_compress.channels.find import channel_groups

BUDGETED = {"blocks": 5, "base": 1, "step": 1, "step_mode": "lin_grow"}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def outputs_of(network: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """What the named modules return, and the network's output."""
    kept: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
        for name in names
    ]
    output = network(x)
    for hook in hooks:
        hook.remove()
    return [*(kept[name] for name in names), output]


def layer_shapes(network: MSDNet, x: Tensor) -> list[list[tuple[int, int]]]:
    """Channels and size of every remaining scale after each layer, a transition included in its layer."""
    shapes = []
    features = network.stem(x)
    for block in network.blocks:
        for part in block:  # type: ignore[union-attr]  # a Sequential
            features = part(features)
            shapes.append([(f.shape[1], f.shape[2]) for f in features])
            if type(part).__name__ == "_Transition":
                shapes.pop(-2)
    return shapes


def test_scales_channels_and_dropped_scales_are_those_calculated_by_hand() -> None:
    # 15 layers and 3 scales: every 5 layers a scale is dropped. At the finest scale 16 channels come in and each layer
    # adds 6, so that layers 1 to 5 leave 22 to 46; layer 6 makes 52, which the transition halves; layer 11 makes 56.
    widths = [22, 28, 34, 40, 46, 26, 32, 38, 44, 50, 28, 34, 40, 46, 52]
    sizes = [(1, 32), (2, 16), (4, 8)]
    expected = [[(width * f, size) for f, size in sizes[layer // 5 :]] for layer, width in enumerate(widths)]
    assert layer_shapes(MSDNet(**BUDGETED), torch.zeros(1, 3, 32, 32)) == expected

    network = MSDNet()
    assert [len(block) for block in network.blocks] == [4, 2, 3, 2, 2, 3, 2]  # type: ignore[arg-type]  # transitions count
    # 16 layers, dropped every 6: 16 + 6 * 6 = 52, 58 / 2 = 29, 29 + 5 * 6 = 59, 65 / 2 = 32 (rounded down), 32 + 3 * 6
    coarsest = [4 * width for width in (40, 52, 35, 47, 59, 38)]
    features = outputs_of(network, network.exits, torch.zeros(1, 3, 32, 32))
    assert [(f.shape[1], f.shape[2]) for f in features[:-1]] == [(width, 8) for width in coarsest]
    assert network.classifier[0].in_channels == 4 * 50


def test_an_exit_behind_a_transition_is_the_transition() -> None:
    network = MSDNet(**BUDGETED)
    assert network.exits == ("blocks.0.0.scale2", "blocks.1.1.scale2", "blocks.2.3.scale2", "blocks.3.3.scale2")
    assert outputs_of(network, ["blocks.2.3.scale2"], torch.zeros(1, 3, 32, 32))[0].shape == (1, 26 * 4, 8, 8)


def test_parameters_and_flops_are_those_of_the_authors_imagenet_network() -> None:
    # A log of the authors' PyTorch code, kalviny/MSDNet-PyTorch issue 10: up to each classifier of 5 blocks of 7 layers
    published = [(615.69, 8.76), (1436.39, 20.15), (2283.21, 31.73), (2967.42, 41.86), (3253.79, 62.31)]
    with torch.device("meta"):
        network = MSDNet(
            blocks=5, base=7, step=7, channels=32, growth=16, factors=(1, 2, 4, 4), bottleneck=(1, 2, 4, 4),
            image_size=56, num_classes=1000,
        )  # fmt: skip
        # Theirs begins with a 7x7 convolution of stride 2 and a max pooling, and its heads keep the channels.
        network.stem["scale0"] = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        x = torch.zeros(1, 3, 224, 224)
        *features, _ = outputs_of(network, [*network.exits, "blocks.4.6.scale3"], x)
        heads = [MSDNetClassifier(f.shape[1], size=7, num_classes=1000, width=f.shape[1]) for f in features]

    # Their counter adds one operation per ReLU and per bias, and the window's size per output of a pooling.
    operations = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal operations
        if isinstance(module, nn.Conv2d | nn.Linear):
            operations += output.numel() * module.weight[0].numel()
        operations += output.numel() * {nn.ReLU: 1, nn.AvgPool2d: 4, nn.MaxPool2d: 9, nn.Linear: 1}.get(type(module), 0)

    for module in [*network.modules(), *nn.ModuleList(heads).modules()]:
        if not list(module.children()):
            module.register_forward_hook(count)
    maps, size, found = network.stem(x), parameters(network.stem), []
    for block, head in zip(network.blocks, heads, strict=True):
        maps = block(maps)
        head(maps[-1])
        size += parameters(block) + parameters(head)
        found.append((round(operations / 1e6, 2), round(size / 1e6, 2)))
    assert found == published


def test_parameters_of_a_small_network_by_hand() -> None:
    network = MSDNet(
        blocks=2, base=1, step=1, channels=4, growth=2, factors=(1, 2), bottleneck=(1, 2), head_width=8, image_size=8
    )

    def conv(inputs: int, outputs: int, size: int) -> int:
        return inputs * outputs * size**2 + 2 * outputs  # and its batch norm

    stem = conv(3, 4, 3) + conv(4, 8, 3)
    fine = conv(4, 2, 1) + conv(2, 2, 3)  # 4 -> 6 channels
    coarse = conv(4, 2, 1) + conv(2, 2, 3) + conv(8, 4, 1) + conv(4, 2, 3)  # 8 -> 12: two from the finer scale
    dropping = conv(6, 2, 1) + conv(2, 2, 3) + conv(12, 4, 1) + conv(4, 2, 3)  # 12 -> 16, and the finest is gone
    head = conv(8, 8, 3) + conv(8, 8, 3) + 8 * 10 + 10
    assert parameters(network) == stem + fine + coarse + dropping + conv(16, 8, 1) + head


SMALL = {"channels": 8, "in_channels": 1, "head_width": 16, "num_classes": 3}


@pytest.mark.parametrize(
    "options",
    [
        {**SMALL, "blocks": 3, "base": 1, "step": 1, "step_mode": "lin_grow", "image_size": 28},
        {**SMALL, "blocks": 4, "base": 1, "step": 1, "image_size": 32},  # the last layers would keep two scales
        {**SMALL, "blocks": 3, "base": 1, "step": 1, "factors": (1, 2), "bottleneck": (1, 2), "image_size": 8},
        {**SMALL, "blocks": 1, "base": 2, "factors": (1,), "bottleneck": (1,), "image_size": 9},
        {**SMALL, "blocks": 2, "base": 2, "step": 2, "image_size": 64},  # what the head leaves is not one pixel
    ],
)
def test_gradients_of_all_classifiers_reach_every_parameter(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    network = MSDNet(**options)  # type: ignore[arg-type]
    x, y = torch.randn(6, 1, options["image_size"], options["image_size"]), torch.randint(3, (6,))
    *features, logits = outputs_of(network, network.exits, x)
    heads = nn.ModuleList(msdnet_classifier(feature, 3, width=16) for feature in features)
    losses = [F.cross_entropy(head(feature), y) for head, feature in zip(heads, features, strict=True)]
    assert logits.shape == (6, 3)
    (sum(losses) + F.cross_entropy(logits, y)).backward()
    without = [n for n, p in [*network.named_parameters(), *heads.named_parameters()] if p.grad is None]
    assert without == []


def test_its_channels_can_be_found_and_cut() -> None:
    sizes = {"channels": 4, "factors": (1, 2), "bottleneck": (1, 2), "head_width": 8, "image_size": 8}
    network = MSDNet(blocks=2, base=1, step=1, in_channels=1, **sizes).eval()  # type: ignore[arg-type]
    for module in network.modules():  # statistics that a fresh batch norm lacks
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    x = torch.randn(2, 1, 8, 8)
    groups = [group for group in channel_groups(network, x) if group.frozen is None]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(groups) == len(convolutions)  # concatenation joins channels, but makes none: each is a group of its own
    before = parameters(network)
    with torch.no_grad():
        for group in groups:
            for member in group.members:
                if member.produces:
                    tensor = network.get_parameter(member.tensor)
                    tensor.narrow(0, 0, 1).zero_()
        expected = network(x)
        thin = shrink(network, x)
    assert parameters(thin) < before
    torch.testing.assert_close(thin(x), expected, rtol=1e-4, atol=1e-5)


def test_bad_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="step_mode must be one of even, lin_grow; got 'odd'"):
        MSDNet(step_mode="odd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"equally long; got \[1, 2, 4\] and \[1, 2\]"):
        MSDNet(bottleneck=(1, 2))
    with pytest.raises(ValueError, match=r"at least one layer; got blocks=2 with \[1, 0\]"):
        MSDNet(blocks=2, base=1, step=0)
    with pytest.raises(ValueError, match="3 scales of MSDNet leave 1 pixel of images of 4x4"):
        MSDNet(image_size=4)
    with pytest.raises(ValueError, match=r"\(N, C, H, H\); got \(2, 64\)"):
        msdnet_classifier(torch.zeros(2, 64), 10)
