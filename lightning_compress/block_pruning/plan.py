"""Find how blocks can leave a network whose code stays as it is: which modules become which stand-ins.

A module that does nothing but its block becomes one that returns its input. Of other blocks, the modules of the branch
become stand-ins, the last of which returns zeros. The cheapest choice is taken that computes what the network does with
zeros in the branch's place: with random weights and in double precision, for several batch sizes and in both modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_compress.block_pruning.calls import Calls, described, watch, zeroed
from lightning_compress.block_pruning.stand_in import Described, StandIn
from lightning_compress.block_pruning.stand_in import replace as make_stand_in
from lightning_compress.channels.sandbox import doubles, sandbox
from lightning_compress.core.axes import BATCH, Axes
from lightning_compress.core.evaluation import buffers_restored, modes_restored, set_mode
from lightning_compress.core.example_inputs import ExampleInputs, first_samples
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import compare, run
from lightning_compress.stages.blocks import Block

FEW = 4  # samples, with which the network runs in a sandbox
_TOLERANCE = 1e-12
_LARGE = 40.0  # so that an activation with bounds, such as ReLU6, is not taken for one that changes nothing


class BlockError(ValueError):
    """A block that can't leave a network, with the reason."""


@dataclass(frozen=True)
class Place:
    """A module that becomes a stand-in.

    Attributes:
        path: Of the module.
        described: What it returns from then on.
        block: The names of the blocks that leave with it.
        macs: Their multiply-accumulates; 0 for further modules of a block.
    """

    path: str
    described: Described
    block: str
    macs: int


Option = list[Place]


def find_places(network: nn.Module, example_inputs: ExampleInputs, blocks: Sequence[Block]) -> list[Place]:
    """Return the modules that become stand-ins when blocks leave a network, which stays as it is.

    Raises:
        BlockError: A block can't leave; the message has the reason.
    """
    with sandbox(network), ExitStack() as back:
        trial = _Trial(network, doubles(first_samples(example_inputs, FEW), noise=True))
        zeros = {block.name: back.enter_context(_ending(network, block)) for block in blocks}
        paths = {path for block in blocks for path in (*block.modules, *_around(network, block))}
        watched, handles = watch(network, sorted(paths))
        with hooked(*handles):
            trial.begin(watched)
        options = {block.name: list(_options(block, watched, network, blocks)) for block in blocks}
        for block in blocks:
            if not options[block.name]:
                raise BlockError(_said(network, block, _why_not(block, watched)))
        return trial.all_at_once(blocks, options) or trial.one_by_one(blocks, options, zeros)


@contextmanager
def without(network: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Run a network in the block of code with zeros in the place of branches."""
    with ExitStack() as back:
        for block in blocks:
            back.enter_context(_ending(network, block))
        yield


@contextmanager
def _ending(network: nn.Module, block: Block) -> Iterator[None]:
    module = network.get_submodule(block.ends)
    with hooked(module.register_forward_hook(lambda _module, _args, output: zeroed(output))):
        yield


def _around(network: nn.Module, block: Block) -> list[str]:
    """Return the modules around all modules of a block, the innermost first, without the network itself."""
    pieces = block.ends.split(".")
    around = [".".join(pieces[:n]) for n in range(len(pieces) - 1, 0, -1)]
    return [
        path
        for path in around
        if all(f"{one}.".startswith(f"{path}.") for one in block.modules)
        and not any(isinstance(one, StandIn) for one in network.get_submodule(path).modules())
    ]


def _options(block: Block, watched: dict[str, Calls], network: nn.Module, leaving: Sequence[Block]) -> Iterator[Option]:
    """Yield the ways in which a block may leave, the cheapest first."""
    for path in _around(network, block):
        if path in block.modules:
            continue
        found = described(watched[path], "input")
        if found is not None:
            inside = [one for one in leaving if f"{one.ends}.".startswith(f"{path}.")]
            names, macs = ", ".join(one.name for one in inside), sum(one.macs for one in inside)
            yield [Place(path, found, names, macs)]
    every = [path for path in block.modules if watched[path].outputs]
    holding = [path for path in every if _holds(watched[path].module)]  # the others cost little, and nothing once thin
    for modules in (holding, every) if holding != every else (every,):
        ending = [path for path in modules if f"{block.ends}.".startswith(f"{path}.")] or modules[-1:]
        for thin, dense in ((True, False), (True, True), (False, False), (False, True)):
            if thin and len(modules) == 1:
                continue
            places: Option = []
            for path in modules:
                last = path in ending
                found = described(watched[path], "zeros", thin=thin and not last, dense=dense and (last or not thin))
                if found is not None:
                    places.append(Place(path, found, block.name, 0 if places else block.macs))
            if places and len(places) == len(modules):
                yield places


def _holds(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


class _Trial:
    """The network in a sandbox, with the inputs for which it must compute the same once blocks have left."""

    def __init__(self, network: nn.Module, example_inputs: ExampleInputs) -> None:
        self.network = network
        axes = Axes.of(network, example_inputs, {})
        n = axes.sizes[BATCH]
        sizes = dict.fromkeys((n, 3 if n != 3 else 2, 5 if n != 5 else 4))
        inputs = [axes.resized({BATCH: size}) for size in sizes]
        larger = tree_map_only(Tensor, lambda one: one * _LARGE if one.is_floating_point() else one, inputs[-1])
        self._runs = [(one, False) for one in (*inputs, larger)] + [(inputs[1], True)]
        self._expected: list[list[Tensor]] = []

    def begin(self, watched: dict[str, Calls]) -> None:
        """Run the network with zeros in the place of branches, and note what it and its modules return."""
        runs, self._runs = self._runs, []
        for inputs, training in runs:
            for one in watched.values():
                one.begin()
            noted = [(one, len(one.inputs)) for one in watched.values()]
            try:
                found = self._run(inputs, training)
            except Exception:  # a network may need labels for training
                if not training:
                    raise
                for one, n in noted:
                    del one.inputs[n:], one.outputs[n:]
                continue
            self._expected.append(found)
            self._runs.append((inputs, training))

    def _run(self, inputs: Any, training: bool) -> list[Tensor]:
        with modes_restored(self.network), buffers_restored(self.network), _Certain():
            set_mode(self.network, training)
            return run(self.network, inputs)

    def _wrong(self) -> str | None:
        """Return what is wrong with the network as it is now, or None."""
        for (inputs, training), expected in zip(self._runs, self._expected, strict=True):
            try:
                found = self._run(inputs, training)
            except Exception as error:  # whatever the network's code raises
                return next(iter(str(error).strip().splitlines()), type(error).__name__)
            if (wrong := compare(found, expected, _TOLERANCE)) is not None:
                return wrong
        return None

    def all_at_once(self, blocks: Sequence[Block], options: dict[str, list[Option]]) -> list[Place]:
        """Return the cheapest places of all blocks, if they are right together; else none."""
        places = _outermost([place for block in blocks for place in options[block.name][0]])
        with self._replaced(places):
            return places if self._wrong() is None else []

    def one_by_one(
        self, blocks: Sequence[Block], options: dict[str, list[Option]], zeros: dict[str, Any]
    ) -> list[Place]:
        """Return the places of all blocks, after trying each block's by itself."""
        chosen: list[Place] = []
        with ExitStack() as back:
            for block in blocks:
                if any(f"{block.ends}.".startswith(f"{one.path}.") for one in chosen):
                    continue  # it has left with another one
                wrong: str | None = None
                for option in options[block.name]:
                    tried = ExitStack()
                    tried.enter_context(self._replaced(option))
                    wrong = self._wrong()
                    if wrong is None:
                        back.push(tried)
                        chosen += option
                        break
                    tried.close()
                if wrong is not None:
                    raise BlockError(_said(self.network, block, f"without it, {wrong}"))
        return chosen

    @contextmanager
    def _replaced(self, places: list[Place]) -> Iterator[None]:
        with ExitStack() as back:
            for one in places:
                back.callback(make_stand_in(self.network.get_submodule(one.path), one.described, block=one.block))
            yield


def _outermost(places: list[Place]) -> list[Place]:
    """Return places without those inside others, and those that stand twice."""
    found: list[Place] = []
    for one in places:
        inside = any(f"{one.path}.".startswith(f"{other.path}.") and one.path != other.path for other in places)
        if not inside and all(one.path != other.path for other in found):
            found.append(one)
    return found


def _why_not(block: Block, watched: dict[str, Calls]) -> str:
    for path in block.modules:
        calls = watched[path]
        if calls.most > 1:
            return f"{path!r} runs {calls.most} times in one pass"
        if calls.odd:
            return f"{path!r} returns an object of type {calls.odd}"
    return f"the shapes that {', '.join(map(repr, block.modules))} return do not follow from those of their inputs"


def _said(network: nn.Module, block: Block, reason: str) -> str:
    return f"The block {block.name!r} can't leave {type(network).__name__}: {reason}."


class _Certain(TorchFunctionMode):
    """Gives random numbers one value, because a network without some blocks draws fewer of them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "bernoulli_":
            return args[0].fill_(1.0)
        found = func(*args, **(kwargs or {}))
        if name in ("rand", "rand_like", "bernoulli", "randn", "randn_like"):
            return torch.full_like(found, 0.5)
        return found
