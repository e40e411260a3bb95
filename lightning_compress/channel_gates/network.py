"""A network with gates for use without training, which computes only the channels that a sample chooses, where it pays.

one sample      conv(x[kept before], W[kept, kept before]): the chosen channels, from those that were chosen before
a batch         all channels and a product ("dense"), one convolution for each set of channels ("sets"), or one sample
                after the other ("single"): what was the fastest here
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_compress.channel_gates.find import Reader, find_layers
from lightning_compress.channel_gates.gates import gates_of
from lightning_compress.channel_gates.making import take_gates
from lightning_compress.channel_gates.slices import Feed, ReadingLayer, SlicedLayer
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call, first_samples
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.core.structure import detach, structures

Batched = Literal["dense", "sets", "single"]


class ChannelGatedNetwork(nn.Module):
    """A copy of a network with gates, for evaluation.

    Args:
        network: Has gates; it stays as it is.
        example_inputs: Some samples, with which the layers that read gated channels are found and, unless `min_gain` is
            None, the ways to run are timed: one sample, and all of them as a batch.
        min_gain: A layer computes its chosen channels alone for one sample, and a batch is run in sets or singly, if
            that saves more than this share of the time; None: always, a batch in sets.
        rounds: How often each way is timed.

    Attributes:
        sliced: By layer whether it computes the chosen channels alone for one sample.
        batched: How a batch is run.
        network: The copy.

    Raises:
        ValueError: The network has no gates.

    Example:
        >>> from lightning_compress.channel_gates import Layer, LayerGates, give_gates
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
        >>> give_gates(net, LayerGates([Layer("0", "0", 2, 4, last=True)], share=0.5))
        >>> x = torch.rand(1, 2)
        >>> gated = ChannelGatedNetwork(net, x, min_gain=None)
        >>> torch.allclose(gated(x), net(x)), gated.sliced
        (True, {'0': True})
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: ExampleInputs,
        *,
        min_gain: float | None = 0.0,
        rounds: int = 9,
    ) -> None:
        super().__init__()
        if min_gain is not None:
            min_gain = real_number(
                min_gain, "min_gain is the share of the time that must be saved, or None", infinite=True
            )
        whole_number(rounds, "rounds is how often each way is timed, 1 or more", least=1)
        self.network = copy.deepcopy(network).eval()
        gates = gates_of(self.network)
        if gates is None:
            raise ValueError(f"{type(network).__name__} has no gates: wrap its module in ChannelGates first.")
        take_gates(self.network)
        for one in structures(self.network):
            if one.kind == "channel_gates":
                detach(self.network, one)
        names = [layer.name for layer in gates.layers]
        readers = find_layers(self.network, example_inputs, names).readers
        self.gates = gates
        self.batched: Batched = "sets"
        self._layers = {
            layer.name: SlicedLayer(self.network, layer, gates, thin=layer.name in readers) for layer in gates.layers
        }
        self._connect(readers)
        if min_gain is not None:
            self._choose(example_inputs, min_gain, rounds)
        self.eval()

    @property
    def sliced(self) -> dict[str, bool]:
        return {name: one.slices for name, one in self._layers.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's output, for a batch of any size."""
        if self.batched == "single" and (samples := batch_size((args, kwargs))) > 1:
            return self._singly(samples, args, kwargs)
        sets = self.batched == "sets"
        for one in self._layers.values():
            one.in_sets = sets
        return self.network(*args, **kwargs)

    def _singly(self, samples: int, args: Any, kwargs: Any) -> Any:
        """Run one sample after the other."""
        found = []
        for number in range(samples):

            def part(leaf: Any, number: int = number) -> Any:
                has_samples = isinstance(leaf, Tensor) and leaf.shape[:1] == (samples,)
                return leaf[number : number + 1] if has_samples else leaf

            some_args, some_kwargs = tree_map(part, (args, kwargs))
            found.append(self.network(*some_args, **some_kwargs))
        leaves = iter([torch.cat(some) for some in zip(*(_tensors(one) for one in found), strict=True)])
        return tree_map_only(Tensor, lambda _: next(leaves), found[0])

    def _connect(self, readers: Mapping[str, Sequence[Reader]]) -> None:
        """Have the layers that read chosen channels know of the layers that choose them."""
        fed: dict[str, list[tuple[SlicedLayer, Tensor]]] = {}
        for name, reading in readers.items():
            for reader in reading:
                fed.setdefault(reader.name, []).append((self._layers[name], reader.index))
        for name, sources in fed.items():
            module: Any = self.network.get_submodule(name)
            feed = Feed(sources, module.weight.shape[1])
            if name in self._layers:
                self._layers[name].feed = feed
            else:
                vars(module)["forward"] = ReadingLayer(module, feed)

    # ------------------------------------------------------------------ what pays here

    def _choose(self, example_inputs: ExampleInputs, min_gain: float, rounds: int) -> None:
        """Time one sample with and without slices in each layer, and a batch in each way, and keep the fastest."""
        one, every = first_samples(example_inputs, 1), list(self._layers)
        ways = {name: self._slicing([other for other in every if other != name]) for name in every}
        seconds = self._timed(ways | {"": self._slicing(every)}, one, rounds)
        slower = [name for name in every if seconds[name] > seconds[""]]  # it takes longer without these slices
        ways = {"none": self._slicing(()), "all": self._slicing(every), "some": self._slicing(slower)}
        seconds = self._timed(ways, one, rounds)
        fastest = min(ways, key=lambda way: seconds[way])
        ways[fastest if seconds[fastest] < (1.0 - min_gain) * seconds["none"] else "none"]()
        if batch_size(example_inputs) > 1:
            seconds = self._timed({way: self._batching(way) for way in _BATCHED}, example_inputs, rounds)
            fastest = min(_BATCHED, key=lambda way: seconds[way])
            pays = seconds[fastest] < (1.0 - min_gain) * seconds["dense"]
            self.batched = fastest if pays else "dense"
        else:
            self.batched = "dense"

    def _slicing(self, names: Sequence[str]) -> Callable[[], None]:
        def put() -> None:
            for name, one in self._layers.items():
                one.slices = name in names

        return put

    def _batching(self, way: Batched) -> Callable[[], None]:
        def put() -> None:
            self.batched = way

        return put

    def _timed(self, ways: Mapping[Any, Callable[[], None]], inputs: ExampleInputs, rounds: int) -> dict[Any, float]:
        """Return the least seconds of each way, which take turns: what else the machine does only adds to them."""
        seconds: dict[Any, list[float]] = {name: [] for name in ways}
        with evaluating(self):
            for _ in range(rounds + 1):
                for name, put in ways.items():
                    put()
                    start = time.perf_counter()
                    leaves = _tensors(call(self, inputs))
                    if leaves and leaves[0].is_cuda:
                        torch.cuda.synchronize(leaves[0].device)
                    seconds[name].append(time.perf_counter() - start)
        return {name: min(some[1:]) for name, some in seconds.items()}  # the first one warms up


_BATCHED: tuple[Batched, ...] = ("dense", "sets", "single")


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
