"""How long finding the channel groups of large networks takes, in seconds: wall clock, and the processor's.

Random weights, two images of 224 pixels (NFNet-F0: 192), medians of the rounds, in one process after a small network
that is not counted. The processor's seconds tell how far a busy machine disturbed the others.

    pip install torchvision timm
    python benchmarks/planning.py --rounds 3 --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.channels.find import ChannelGroups, channel_groups

NETWORKS = ("resnet50", "swin_t", "vit_b_16", "tnt_s_patch16_224", "dm_nfnet_f0")
PIXELS = {"dm_nfnet_f0": 192}  # the resolution that it is trained at


def make(name: str) -> nn.Module:
    """A network of torchvision or, where that has none of the name, of timm, with random weights."""
    import timm
    import torchvision

    torch.manual_seed(0)
    if name in torchvision.models.list_models():
        model: nn.Module = torchvision.models.get_model(name, weights=None)
    else:
        model = timm.create_model(name, pretrained=False)
    return model.eval()


def timed(model: nn.Module, inputs: Tensor) -> tuple[float, float, ChannelGroups]:
    """Seconds, the processor's seconds, and the groups."""
    wall, processor = time.perf_counter(), time.process_time()
    groups = channel_groups(model, inputs)
    return time.perf_counter() - wall, time.process_time() - processor, groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=NETWORKS, help="names of networks of torchvision or timm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    try:
        import timm
        import torchvision
    except ImportError as error:
        parser.exit(
            2, f"This benchmark needs {error.name}, which nothing else here does: pip install torchvision timm\n"
        )
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    table = Table(
        *("network", "seconds", "processor", "groups", "free"),
        title=f"torchvision {torchvision.__version__}, timm {timm.__version__}, torch {torch.__version__}, "
        f"{options.threads} threads, medians of {options.rounds} rounds",
    )
    channel_groups(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.zeros(2, 2))  # torch.export imports a lot
    for name in options.only:
        model, pixels = make(name), PIXELS.get(name, 224)
        rounds = [timed(model, torch.zeros(2, 3, pixels, pixels)) for _ in range(options.rounds)]
        wall, processor = (f"{statistics.median(one[at] for one in rounds):.1f}" for at in (0, 1))
        groups = rounds[-1][2]
        row = name, wall, processor, str(len(groups)), str(len(groups.free(inexact=True)))
        print(*row, flush=True)
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
