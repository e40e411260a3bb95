"""What convolutions see and answer, as far as the fits of blocks need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.conv_substitution.blocks import GHOST_SIZE
from lightning_compress.conv_substitution.values import Seen
from lightning_compress.core.example_inputs import ExampleInputs, call, to_device
from lightning_compress.core.hooks import hooked
from lightning_compress.replacement.find import Layer, plainly
from lightning_compress.replacement.layer import LayerShape
from lightning_compress.replacement.statistics import POSITIONS, InputStatistics, gather_statistics


def look(
    network: nn.Module,
    layers: Mapping[str, Layer],
    example_inputs: ExampleInputs,
    batches: Sequence[ExampleInputs],
    *,
    outputs: bool,
) -> dict[str, Seen]:
    """Return what each of some convolutions sees, over some batches and over all ranks; every rank must call this.

    Args:
        network: The network.
        layers: The convolutions, by path.
        example_inputs: What the network is called with, to see which norms read the layers.
        batches: Likewise, for the statistics; a rank may have none.
        outputs: Whether the neighbourhoods of outputs are looked at, as ghosts need them.
    """
    before = gather_statistics(network, layers, batches)
    after = _outputs(network, layers, batches) if outputs else {}
    normed = norms_behind(network, layers, example_inputs)
    found = {}
    for path, layer in layers.items():
        centred = layer.map.bias is not None or path in normed
        covariance, mean = _moments(before[path], centred=centred)
        channels = layer.map.sizes.inputs
        seen = Seen(covariance.view(channels, -1, channels, covariance.shape[0] // channels), mean.view(channels, -1))
        if outputs:
            moments, near = _moments(after[path], centred=centred)
            count = layer.map.sizes.outputs
            moments = moments.view(count, -1, count, moments.shape[0] // count)
            seen = Seen(
                seen.covariance,
                seen.mean,
                lags=moments[..., moments.shape[1] // 2],
                within=moments.diagonal(dim1=0, dim2=2).permute(2, 0, 1),
                near=near.view(count, -1),
            )
        found[path] = seen
    return found


def _moments(statistics: InputStatistics, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the covariance and the mean; or the second moments, where no bias and no norm can take the mean."""
    mean = statistics.mean
    if centred:
        return statistics.covariance, mean
    return statistics.covariance + torch.outer(mean, mean), torch.zeros_like(mean)


def _outputs(
    network: nn.Module, layers: Mapping[str, Layer], batches: Iterable[ExampleInputs]
) -> dict[str, InputStatistics]:
    """Return the statistics of the neighbourhoods of outputs: of what a convolution of ghosts' size would see."""
    found = {path: InputStatistics(_neighbourhood(layer.map.sizes)) for path, layer in layers.items()}
    generator = torch.Generator().manual_seed(0)

    def watch(one: InputStatistics, _module: nn.Module, _args: Any, output: Tensor) -> None:
        one.add(output, limit=POSITIONS, generator=generator)

    handles = [network.get_submodule(path).register_forward_hook(partial(watch, one)) for path, one in found.items()]
    device = next(iter(network.parameters())).device
    with hooked(*handles), plainly(network):
        for batch in batches:
            call(network, to_device(batch, device))
    for one in found.values():
        one.gather()
    return found


def _neighbourhood(of: LayerShape) -> LayerShape:
    dims = len(of.kernel)
    return LayerShape(
        kind="conv",
        shape=(of.outputs, of.outputs, *[GHOST_SIZE] * dims),
        bias=False,
        stride=(1,) * dims,
        padding=(GHOST_SIZE // 2,) * dims,
        dilation=(1,) * dims,
        dtype=of.dtype,
        device=of.device,
    )


def norms_behind(network: nn.Module, layers: Iterable[str], inputs: ExampleInputs) -> set[str]:
    """Return those of some layers whose output a norm reads that takes away the mean of each channel.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.ReLU())
        >>> norms_behind(net, ["0", "2"], torch.zeros(2, 1, 4, 4))
        {'0'}
    """
    outputs: list[tuple[str, Tensor]] = []
    found: set[str] = set()

    def answers(path: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append((path, output))

    def reads(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.update(path for path, one in outputs if args and args[0] is one)

    norms = [one for one in network.modules() if isinstance(one, _NormBase)]
    handles = [network.get_submodule(path).register_forward_hook(partial(answers, path)) for path in layers]
    handles += [one.register_forward_pre_hook(reads) for one in norms]
    device = next(iter(network.parameters())).device
    with hooked(*handles), plainly(network):
        call(network, to_device(inputs, device))
    return found
