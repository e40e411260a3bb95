"""Residual blocks of networks of all kinds: all found, none wrong, and right for every sample that skips them?

"found" is what `find_blocks` takes by itself (identity shortcuts), and the projections, which are taken only when they
are named. "expected" was counted by hand, in the papers' figures or the code. "zeroed": hooks that multiply all
branches by zero, against the graph with zeros in their place. "skipping": random gates that each read their block's
input, a batch of eleven different samples in a `SkippingNetwork`, against hooks that multiply branches by 0 or 1, and
against its samples one by one. Largest differences over the largest entry, in double precision.

    PYTHONPATH=tests python benchmarks/skippable_blocks.py
    PYTHONPATH=tests python benchmarks/skippable_blocks.py --zoo --only "swin" "gpt2"
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from lightning_compress.baselines.networks import ResNet20
from lightning_compress.core.axes import BATCH
from lightning_compress.core.example_inputs import call
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import select_output
from lightning_compress.skipping import SkipGates, SkippingNetwork, new_gates
from lightning_compress.stages.blocks import arguments_of, found_in
from lightning_compress.stages.branch_hooks import gated
from lightning_compress.stages.split import axes_of, different
from lightning_compress.stages.trace import SplitError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SAMPLES = 11
CLAIM, BATCH_CLAIM = 1e-12, 1e-6


class Known(NamedTuple):
    """A network, and how many blocks it has: with an identity as shortcut, with a projection."""

    make: Callable[[], tuple[nn.Module, Any]]
    identities: int
    projections: int = 0


def images(side: int) -> Tensor:
    return torch.randn(3, 3, side, side)


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 50, (3, 7))}


def of_transformers(model: str, inputs: Callable[[], Any], **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import transformers

        config = getattr(transformers, f"{model.split('For')[0].removesuffix('LMHeadModel')}Config")(**options)
        return getattr(transformers, model)(config), inputs()

    return make


class PreActivation(nn.Module):
    """He et al. 2016, with the first norm and ReLU before a projection, too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.project = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        shortcut = x if self.project is None else self.project(y)
        return shortcut + self.conv2(self.norm2(self.conv1(y)).relu())


class Inverted(nn.Module):
    """A block of MobileNetV2 and V3 and of EfficientNet: expansion, depthwise, squeeze and excitation, projection."""

    def __init__(self, inputs: int, outputs: int, *, excite: bool, drop: float = 0.0) -> None:
        super().__init__()
        wide = 3 * inputs
        self.same, self.drop = inputs == outputs, nn.Dropout(drop)
        self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1), nn.BatchNorm2d(wide), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.SiLU(inplace=True)
        )
        self.excite = Excite(wide) if excite else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        if not self.same:
            return y
        y = self.drop(y)
        y += x
        return y


class Excite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid() * x


def stack(*blocks: nn.Module, width: int, last: int, side: int = 12) -> Callable[[], tuple[nn.Module, Any]]:
    layers = [nn.Conv2d(3, width, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 5)]
    return lambda: (nn.Sequential(*layers), images(side))


def inverted(excite: bool, drop: float) -> Callable[[], tuple[nn.Module, Any]]:
    widths = [(8, 8), (8, 12), (12, 12), (12, 12), (12, 16), (16, 16)]
    return stack(*(Inverted(a, b, excite=excite, drop=drop) for a, b in widths), width=8, last=16)


TINY: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
RESNET: dict[str, Any] = {"embedding_size": 8, "num_labels": 5}
SMALL = {"layer_type": "basic", "hidden_sizes": [8, 12, 16, 20], "depths": [2, 2, 2, 2]}
DEEP = {"layer_type": "bottleneck", "hidden_sizes": [16, 24, 32, 40], "depths": [3, 4, 6, 3]}

KNOWN: dict[str, Known] = {
    "ResNet-20": Known(lambda: (ResNet20(width=4), images(12)), 7, 2),
    "ResNet-18": Known(of_transformers("ResNetForImageClassification", lambda: images(32), **RESNET, **SMALL), 5, 3),
    "ResNet-50": Known(of_transformers("ResNetForImageClassification", lambda: images(32), **RESNET, **DEEP), 12, 4),
    "pre-activation ResNet": Known(
        stack(*(PreActivation(a, b) for a, b in [(8, 8), (8, 12), (12, 12)]), width=8, last=12), 2, 1
    ),
    "MobileNet-v2": Known(
        of_transformers("MobileNetV2ForImageClassification", lambda: images(32), depth_multiplier=0.35), 10
    ),
    "MobileNet-v3 blocks": Known(inverted(excite=True, drop=0.0), 4),
    "EfficientNet blocks": Known(inverted(excite=True, drop=0.2), 4),
    "EfficientNet-b0": Known(
        of_transformers(
            "EfficientNetForImageClassification",
            lambda: images(32),
            width_coefficient=0.25,
            depth_coefficient=1.0,
            hidden_dim=320,
        ),
        9,
    ),
    "ConvNeXt": Known(
        of_transformers("ConvNextForImageClassification", lambda: images(32), hidden_sizes=[8, 12, 16, 20]), 18
    ),
    "ViT": Known(of_transformers("ViTForImageClassification", lambda: images(32), image_size=32, **TINY), 6),
    "encoder layers of torch": Known(
        lambda: (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 3, None, False),
            torch.randn(3, 7, 16),
        ),
        6,
    ),
    "BERT": Known(of_transformers("BertForSequenceClassification", words, vocab_size=50, **TINY), 6),
    "GPT-2": Known(of_transformers("GPT2LMHeadModel", words, vocab_size=50, n_embd=16, n_layer=3, n_head=2), 6),
    "Llama": Known(of_transformers("LlamaForCausalLM", words, vocab_size=50, num_key_value_heads=1, **TINY), 6),
    "GPT-J (parallel branches)": Known(
        of_transformers("GPTJForCausalLM", words, vocab_size=50, n_embd=16, n_layer=3, n_head=2, rotary_dim=4), 6
    ),
}


class Zeroed(fx.Interpreter):
    """Runs a graph in which some nodes are zeros."""

    def __init__(self, module: fx.GraphModule, ends: set[fx.Node]) -> None:
        super().__init__(module)
        self.ends = ends

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        return torch.zeros_like(found) if n in self.ends else found


def rebuilt(example: Any, leaves: list[Any]) -> Any:
    if isinstance(example, dict):
        return dict(zip(example, leaves, strict=True))
    return tuple(leaves) if isinstance(example, tuple) else leaves[0]


def called(network: Callable[..., Any], inputs: Any) -> Any:
    with torch.no_grad():
        return call(network, inputs)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-300))


def opened(gates: SkipGates) -> SkipGates:
    """Gates that depend strongly on what they read, about half of them open."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in gates.named_parameters():
            if "logit" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * ("weight" in name))
            elif "hidden" in name and parameter.dim() > 1:
                parameter.copy_(3.0 * torch.randn(parameter.shape, generator=generator))
    return gates


def tried(name: str, known: Known, output: Any) -> list[str]:
    torch.manual_seed(0)
    network, example = known.make()
    network = network.double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    cast = lambda one: one.double() if one.is_floating_point() else one  # noqa: E731
    example = (
        {key: cast(one) for key, one in example.items()}
        if isinstance(example, dict)
        else tuple(map(cast, example))
        if isinstance(example, tuple)
        else cast(example)
    )
    start = time.process_time()
    found = found_in(network, example, output)
    seconds = time.process_time() - start
    blocks = found.blocks.blocks
    projections = [one for one in found.blocks.others if one.kind == "projection"]
    axes = axes_of(network, example, output)
    graph = found.branches.graph
    leaves = different(axes)
    inputs = rebuilt(example, leaves)
    samples = next(len(leaf) for leaf, named in zip(leaves, axes.named, strict=True) if BATCH in named.values())
    row = [name, f"{len(blocks)} + {len(projections)}", f"{known.identities} + {known.projections}"]
    if not blocks:
        return [*row, "", "", "", f"{seconds:.1f}", reasons(found.blocks.refused)]
    with torch.no_grad(), hooked(*gated(network, blocks, lambda k, x: x.new_zeros(len(x)))):
        got = select_output(called(network, inputs), output, name)
    ends = {found.of[block.name].end for block in blocks}
    with torch.no_grad():
        expected = Zeroed(graph.module, ends).run(*arguments_of(graph, network, leaves))
    zeroed = apart(got, expected[0] if isinstance(expected, tuple) else expected)
    worst, share = 0.0, []
    for kind in ("per_block", "policy"):
        gates = opened(new_gates(network, inputs, blocks, macs=found.blocks.macs, kind=kind)).eval()
        skipping = SkippingNetwork(network, gates, example, output=output).eval()
        if isinstance(inputs, dict):
            with torch.no_grad():
                answer, ran = skipping.decisions(**inputs)
        else:
            with torch.no_grad():
                answer, ran = skipping.decisions(*(inputs if isinstance(inputs, tuple) else (inputs,)))
        with hooked(*gated(network, blocks, lambda k, x, ran=ran: ran[:, k].double())):
            expected = select_output(called(network, inputs), output, name)
        worst = max(worst, apart(answer, expected))
        for i in range(samples):
            one = rebuilt(example, [leaf[i : i + 1] if n else leaf for leaf, n in zip(leaves, axes.named, strict=True)])
            worst = max(worst, apart(select_output(called(skipping, one), output, name), answer[i : i + 1]))
        share.append(float(ran.double().mean()))
    ran_share = " ".join(f"{100 * one:.0f} %" for one in share)
    return [*row, f"{zeroed:.0e}", f"{worst:.0e}", ran_share, f"{seconds:.1f}", reasons(found.blocks.refused)]


def reasons(refused: Any) -> str:
    """How many sums were refused for each reason, apart from what is named above."""
    counts: dict[str, list[str]] = {}
    for name, reason in refused.items():
        if "projection" not in reason:
            counts.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names[:2])}{'...' if len(names) > 2 else ''}: {why}" for why, names in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument(
        "--zoo", action="store_true", help="the networks of the test suite's zoo, whose blocks are not counted"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=200)
    table = Table(title=f"Residual blocks, float64, torch {torch.__version__}")
    for column in ("network", "found", "expected", "zeroed", "skipping", "ran", "CPU s", "refused"):
        table.add_column(column, overflow="fold")
    networks = KNOWN
    if options.zoo:
        from support.reference import randomize
        from support.zoo import ZOO

        networks = {
            name: Known(lambda one=one: (randomize(one.make(), seed=1), one.inputs()), -1, -1)
            for name, one in ZOO.items()
        }
    wrong = 0
    for name in options.only or networks:
        known = networks[name]
        with torch.no_grad():
            network, example = known.make()
            found = called(network.eval(), example)
        output = None if isinstance(found, Tensor) or hasattr(found, "logits") else "last_hidden_state"
        if isinstance(found, tuple | dict) and not hasattr(found, "logits") and not hasattr(found, "last_hidden_state"):
            output = 0 if isinstance(found, tuple) else next(iter(found))
        try:
            row = tried(name, known, output)
        except SplitError as error:
            table.add_row(name, "", "", "", "", "", "", str(error)[:150])
            wrong += 1
            continue
        counted = known.identities < 0 or row[1] == row[2]
        right = counted and all(float(one or 0) <= most for one, most in ((row[3], CLAIM), (row[4], BATCH_CLAIM)))
        wrong += not right
        row[2] = "" if known.identities < 0 else row[2]
        table.add_row(*row, style=None if right else "red")
        console.print(f"{name}: {row[1]} blocks, {row[3]} {row[4]}", highlight=False)
    console.print(table)
    console.print(f"{wrong} networks with a block missing or wrong, or a difference above the claim.")


if __name__ == "__main__":
    main()
