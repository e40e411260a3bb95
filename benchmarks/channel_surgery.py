"""Half of the channels gone, against Torch-Pruning in the same run: latency, planner time, and thin against built thin.

Torch-Pruning gets what its users write: MagnitudePruner, pruning_ratio 0.5, the classifier ignored. The networks are
the transformers package's with random weights, in the shapes that everybody knows, at 224 px. Who keeps which channels
does not matter to the clock; how many are kept is in the columns of MACs and parameters. A native network is made by
its own class with half of the widths, or layer by layer where no config has these widths.

    python benchmarks/channel_surgery.py --rounds 3 --repeats 10
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import os
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_compress.baselines import ResNet20
from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.measure.footprint import compare_latency
from lightning_compress.measure.macs import count_macs


def resnet18(width: int = 64) -> nn.Module:
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=1000,
    )
    return ResNetForImageClassification(config)


def mobilenet_v2() -> nn.Module:
    return MobileNetV2ForImageClassification(MobileNetV2Config(tf_padding=False, num_labels=1000))


def vit_tiny() -> nn.Module:
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=1000
    )
    return ViTForImageClassification(config)


def swin_tiny() -> nn.Module:
    return SwinForImageClassification(SwinConfig(num_labels=1000))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=5000, use_cache=False))


def images(batch: int = 1, size: int = 224) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


CNNS: dict[str, Callable[[], nn.Module]] = {"ResNet-18": resnet18, "MobileNet-v2": mobilenet_v2}
PLANNED: dict[str, tuple[Callable[[], nn.Module], Callable[[], ExampleInputs]]] = {
    **{name: (make, images) for name, make in CNNS.items()},
    "ViT-tiny": (vit_tiny, images),
    "Swin-tiny": (swin_tiny, images),
    "GPT-2, 6 x 384": (gpt2, lambda: {"input_ids": torch.arange(2 * 64).view(2, 64)}),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def half(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    groups = channel_groups(model, example_inputs)
    keep = {group.name: range(group.size - group.size // 2) for group in groups.free()}
    return cut(model, example_inputs, keep=keep, groups=groups)


def half_by_peer(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example_inputs,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=classifiers(model),
        output_transform=logits,
    )
    pruner.step()
    return model.eval()  # which it leaves in training mode


def classifiers(model: nn.Module) -> list[nn.Module]:
    return [layer for name, layer in model.named_modules() if name.startswith(("classifier", "lm_head"))]


def number_of_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------- latency


def latency(rounds: int, repeats: int) -> Table:
    table = Table(title="50 % of the channels, 224 px: milliseconds of a forward pass, gain in the same turns")
    for column in ("network", "variant", "batch 1", "gain", "batch 8", "gain", "MACs", "parameters"):
        table.add_column(column, justify="left" if column in ("network", "variant") else "right")
    for name, make in CNNS.items():
        variants = {
            "dense": made(make),
            "ours": half(made(make), images()),
            "Torch-Pruning": half_by_peer(made(make), images()),
        }
        seconds = {batch: in_turns(variants, images(batch), rounds, repeats) for batch in (1, 8)}
        for variant, model in variants.items():
            cells = []
            for of_batch in seconds.values():
                gains = [d / m for d, m in zip(of_batch["dense"], of_batch[variant], strict=True)]
                cells += [f"{statistics.median(of_batch[variant]) * 1e3:.1f}", f"{statistics.median(gains):.2f}"]
            macs = count_macs(model, images())[0]
            table.add_row(name, variant, *cells, f"{macs / 1e6:,.0f} M", f"{number_of_parameters(model):,}")
    return table


def in_turns(variants: dict[str, nn.Module], x: Tensor, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Medians of every round, in seconds."""
    found = [compare_latency({name: (m, x) for name, m in variants.items()}, repeats=repeats) for _ in range(rounds)]
    return {name: [one[name] for one in found] for name in variants}


# ---------------------------------------------------------------------------------------------------------- planner


def ours_plans(model: nn.Module, example_inputs: ExampleInputs) -> int:
    return sum(group.frozen is None for group in channel_groups(model, example_inputs))


def peer_plans(model: nn.Module, example_inputs: ExampleInputs) -> int:
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs, output_transform=logits, verbose=False
    )
    return sum(1 for _ in graph.get_all_groups(ignored_layers=classifiers(model)))


class NoAnswerError(Exception):
    pass


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise NoAnswerError(f"no answer in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Planned:
    """Seconds and number of groups, or why there are none."""

    seconds: float
    groups: int
    failure: str = ""

    @classmethod
    def by(cls, planner: Callable[[nn.Module, ExampleInputs], int], name: str, limit: float) -> Planned:
        make, inputs = PLANNED[name]
        model = made(make)
        start = time.perf_counter()
        try:
            with at_most(limit):
                found = planner(model, inputs())
        except Exception as error:  # its row says so, and the other networks go on
            return cls(time.perf_counter() - start, 0, str(error).split("\n")[0] or type(error).__name__)
        return cls(time.perf_counter() - start, found)


def planning(rounds: int, limit: float) -> Table:
    table = Table(title="Finding the groups: seconds, and how many may be cut (Torch-Pruning's: how many it lists)")
    for column in ("network", "ours", "groups", "Torch-Pruning", "groups", "ours / Torch-Pruning"):
        table.add_column(column, justify="left" if column == "network" else "right")
    ours_plans(nn.Linear(2, 2), torch.zeros(1, 2))  # what a first call loads
    for name in PLANNED:
        ours: list[Planned] = []
        peers: list[Planned] = []
        for turn in range(rounds):
            ours.append(Planned.by(ours_plans, name, limit))
            if turn == 0 or not peers[0].failure:
                peers.append(Planned.by(peer_plans, name, limit))
        cells = []
        for found in (ours, peers):
            seconds = statistics.median(one.seconds for one in found)
            cells += ["-", found[0].failure[:60]] if found[0].failure else [f"{seconds:.3f}", str(found[0].groups)]
        both = not (ours[0].failure or peers[0].failure)
        ratio = f"{float(cells[0]) / float(cells[2]):.1f}" if both else "-"
        table.add_row(name, *cells, ratio)
    return table


# ----------------------------------------------------------------------------------------------------- built thin


def layer_by_layer(thin: nn.Module, dense: nn.Module) -> nn.Module:
    """The dense network with new layers in the shapes of the thin one."""
    shapes = {name: tensor.shape for name, tensor in thin.state_dict().items()}
    for name, layer in list(dense.named_modules()):
        new: nn.Module
        if isinstance(layer, nn.Conv2d):
            out, inputs = shapes[f"{name}.weight"][:2]
            groups = out if layer.groups > 1 else 1
            assert layer.groups in (1, layer.out_channels)
            new = nn.Conv2d(
                *(inputs * groups, out, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups),
                bias=layer.bias is not None,
            )
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm2d(shapes[f"{name}.weight"][0], layer.eps, layer.momentum)
        elif isinstance(layer, nn.Linear):
            new = nn.Linear(*reversed(shapes[f"{name}.weight"]), bias=layer.bias is not None)
        else:
            continue
        dense.set_submodule(name, new)
    return dense.eval()


def file_bytes(model: nn.Module, *, plain: bool = False) -> int:
    """Bytes of the saved state dict; `plain`: without the modules' notes, where a cut network has its numbers."""
    state, file = model.state_dict(), io.BytesIO()
    torch.save(dict(state) if plain else state, file)
    return file.tell()


def native(rounds: int, repeats: int) -> Table:
    table = Table(title="Cut to half of the widths against built with them: latency, and bytes more in the file")
    for column in (
        "network",
        "built by",
        "batch",
        "thin ms",
        "native ms",
        "thin / native",
        "rounds",
        "tensors",
        "file",
    ):
        table.add_column(column, justify="left" if column in ("network", "built by", "rounds") else "right")
    thin_mobilenet = half(made(mobilenet_v2), images())
    pairs = {
        "ResNet-18": ("its config", half(made(resnet18), images()), made(lambda: resnet18(32)), 224),
        "MobileNet-v2": ("layer by layer", thin_mobilenet, layer_by_layer(thin_mobilenet, made(mobilenet_v2)), 224),
        "ResNet-20, width 64": (
            *("its argument", half(made(lambda: ResNet20(width=64)), images(1, 32))),
            *(made(lambda: ResNet20(width=32)), 32),
        ),
    }
    for name, (built_by, thin, other, size) in pairs.items():
        other.load_state_dict(copy.deepcopy(thin.state_dict()))
        x = images(2, size)
        with torch.no_grad():
            assert torch.allclose(logits(thin(x)), logits(other(x)), atol=1e-5)
        for batch in (1, 8):
            seconds = in_turns({"thin": thin, "native": other}, images(batch, size), rounds, repeats)
            ratios = [a / b for a, b in zip(seconds["thin"], seconds["native"], strict=True)]
            plain, noted = (file_bytes(thin, plain=p) - file_bytes(other, plain=p) for p in (True, False))
            table.add_row(
                *(name, built_by, str(batch)),
                *(f"{statistics.median(seconds[one]) * 1e3:.2f}" for one in ("thin", "native")),
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                f"{plain:+,} B",
                f"{noted:+,} B of {file_bytes(other):,}",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10, help="forward passes per round")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a planner may take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tables", nargs="+", default=["latency", "planner", "native"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console(width=140)
    console.print(f"torch {torch.__version__}, {arguments.threads} threads, load before: {os.getloadavg()[0]:.1f}")
    if "latency" in arguments.tables:
        console.print(latency(arguments.rounds, arguments.repeats))
    if "planner" in arguments.tables:
        console.print(planning(arguments.rounds, arguments.limit))
    if "native" in arguments.tables:
        console.print(native(arguments.rounds, 3 * arguments.repeats))
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
