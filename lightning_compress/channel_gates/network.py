"""A network with gates for use without training, which computes only the channels that a sample chooses, where it pays.

one sample      conv(x[kept before], W[kept, kept before]): the chosen channels, from those that were chosen before
a batch         all channels and a product ("dense"), one convolution for each set of channels ("sets"), or one sample
                after the other ("single"): what was the fastest here
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_compress.channel_gates.find import Reader, find_layers
from lightning_compress.channel_gates.gates import LayerGates, gates_of
from lightning_compress.channel_gates.kinds import Gate, Layer, saliency
from lightning_compress.channel_gates.making import take_gates
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call, first_samples
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
        >>> from lightning_compress.channel_gates.making import give_gates
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
            layer.name: _Gated(self.network, layer, gates, thin=layer.name in readers) for layer in gates.layers
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
        fed: dict[str, list[tuple[_Gated, Tensor]]] = {}
        for name, reading in readers.items():
            for reader in reading:
                fed.setdefault(reader.name, []).append((self._layers[name], reader.index))
        for name, sources in fed.items():
            module: Any = self.network.get_submodule(name)
            feed = _Feed(sources, module.weight.shape[1])
            if name in self._layers:
                self._layers[name].feed = feed
            else:
                vars(module)["forward"] = _Reading(module, feed)

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
        """Return the median seconds of each way, which take turns."""
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
        return {name: statistics.median(some[1:]) for name, some in seconds.items()}  # the first one warms up


_BATCHED: tuple[Batched, ...] = ("dense", "sets", "single")


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


class _Gated:
    """The forward of a gated layer, whose weight and bias do what the norm at its end did as well.

    Args:
        network: Has the layer.
        layer: Which.
        gates: Of the network.
        thin: Whether the network's code and the layers that follow run with the chosen channels alone.

    Attributes:
        slices: Whether it computes the chosen channels alone for one sample.
        in_sets: Whether it computes a batch by sets of channels.
        kept: The channels that it has computed last; None: all.
        feed: What it reads that was chosen before.
    """

    def __init__(self, network: nn.Module, layer: Layer, gates: LayerGates, *, thin: bool) -> None:
        self.layer, self.gates, self.thin = layer, gates, thin
        self.module: Any = network.get_submodule(layer.name)
        self.gate: Gate = gates.by_layer()[layer.name]
        self.slices, self.in_sets = True, True
        self.kept: Tensor | None = None
        self.feed: _Feed | None = None
        norm: Any = network.get_submodule(layer.end) if layer.end != layer.name else None
        if norm is not None:
            _fold(self.module, norm)
            vars(norm)["forward"] = _unchanged
        vars(self.module)["forward"] = self

    def __call__(self, input: Tensor) -> Tensor:
        x, feed = input, None if self.feed is None else self.feed.positions()
        scores = self.gate(saliency(x, last=self.layer.last), feed)
        mask = self.gates.choice(self.gate, scores)
        factors = self.gate.factors(scores, mask)
        if len(x) == 1 and self.slices:
            return self._one(x, factors[0], mask[0], feed)
        self.kept = None
        if self.in_sets and len(x) > 1:
            return self._sets(x, factors, mask)
        return self._times(_computed(self.module, x, self._weight(None, feed), self.module.bias), factors)

    def _one(self, x: Tensor, factors: Tensor, mask: Tensor, feed: Tensor | None) -> Tensor:
        kept = mask.nonzero().squeeze(1)
        factors = factors.index_select(0, kept).to(x.dtype)
        weight, bias = self._weight(kept, feed), self.module.bias
        weight = weight * factors.view(-1, *[1] * (weight.dim() - 1))
        thin = _computed(self.module, x, weight, None if bias is None else bias.index_select(0, kept) * factors)
        self.kept = kept if self.thin else None
        return thin if self.thin else self._scattered(thin, kept)

    def _sets(self, x: Tensor, factors: Tensor, mask: Tensor) -> Tensor:
        """Compute the samples that have chosen the same channels together."""
        sets, of_sample = torch.unique(mask, dim=0, return_inverse=True)
        output: Tensor | None = None
        for number, chosen in enumerate(sets):
            rows, kept = (of_sample == number).nonzero().squeeze(1), chosen.nonzero().squeeze(1)
            bias = None if self.module.bias is None else self.module.bias.index_select(0, kept)
            thin = _computed(self.module, x.index_select(0, rows), self._weight(kept, None), bias)
            full = self._scattered(thin, kept)
            if output is None:
                output = full.new_zeros(len(x), *full.shape[1:])
            output.index_copy_(0, rows, full)
        assert output is not None
        return self._times(output, factors)

    def _times(self, output: Tensor, factors: Tensor) -> Tensor:
        between = [1] * (output.dim() - 2)
        shape = (len(factors), *between, -1) if self.layer.last else (len(factors), -1, *between)
        return output * factors.to(output.dtype).view(shape)

    def _scattered(self, thin: Tensor, kept: Tensor) -> Tensor:
        dim = thin.dim() - 1 if self.layer.last else 1
        shape = list(thin.shape)
        shape[dim] = self.layer.channels
        return thin.new_zeros(shape).index_copy_(dim, kept, thin)

    def _weight(self, kept: Tensor | None, feed: Tensor | None) -> Tensor:
        weight: Tensor = self.module.weight
        weight = weight if kept is None else weight.index_select(0, kept)
        return weight if feed is None else weight.index_select(1, feed)


class _Reading:
    """The forward of a layer without gates that reads chosen channels."""

    def __init__(self, module: nn.Module, feed: _Feed) -> None:
        self.module: Any = module
        self.feed = feed

    def __call__(self, input: Tensor) -> Tensor:
        positions, weight = self.feed.positions(), self.module.weight
        if positions is not None:
            weight = weight.index_select(1, positions)
        return _computed(self.module, input, weight, self.module.bias)


class _Feed:
    """The positions that a layer reads, of those along the second dimension of its weight.

    Args:
        sources: Layers that choose, with the positions of their channels.
        size: How many positions there are.
    """

    def __init__(self, sources: Sequence[tuple[_Gated, Tensor]], size: int) -> None:
        self.sources, self.size = list(sources), size
        _, index = self.sources[0]
        self._ordered = len(sources) == 1 and torch.equal(index.reshape(-1), torch.arange(size))

    def positions(self) -> Tensor | None:
        """Return the positions that were computed, ascending; None: all."""
        if all(source.kept is None for source, _ in self.sources):
            return None
        if self._ordered:
            source, index = self.sources[0]
            assert source.kept is not None
            return source.kept if index.shape[1] == 1 else index.to(source.kept.device)[source.kept].reshape(-1)
        there: Tensor | None = None
        for source, index in self.sources:
            if source.kept is not None:
                there = torch.ones(self.size, dtype=torch.bool, device=source.kept.device) if there is None else there
                mine = index.to(there.device)
                there[mine.reshape(-1)] = False
                there[mine[source.kept].reshape(-1)] = True
        assert there is not None
        return there.nonzero().squeeze(1)


def _unchanged(input: Tensor) -> Tensor:
    return input


def _computed(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a convolution or linear layer computes with another weight and bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    found: Tensor = module._conv_forward(x, weight, bias)
    return found


@torch.no_grad()
def _fold(module: Any, norm: Any) -> None:
    """Give a layer the weight and bias with which it returns what the batch norm behind it returns in evaluation."""
    if parametrize.is_parametrized(module):
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name)
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = (0.0 if module.bias is None else module.bias) - norm.running_mean
    weight = module.weight * scale.view(-1, *[1] * (module.weight.dim() - 1))
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    module.register_parameter("weight", nn.Parameter(weight.to(module.weight.dtype)))
    module.register_parameter("bias", nn.Parameter(bias.to(module.weight.dtype)))
