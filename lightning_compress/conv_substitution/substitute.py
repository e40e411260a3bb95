"""Replace the convolutions of a network by blocks of cheaper ones, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.conv_substitution.blocks import FORMS, numbers_for
from lightning_compress.conv_substitution.record import ConvBlockStructure
from lightning_compress.conv_substitution.seen import look
from lightning_compress.conv_substitution.values import values, white_noise
from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.core.recalibrate import recalibrate
from lightning_compress.core.select import exact_patterns, select_parameters
from lightning_compress.core.undo import as_before_on_error
from lightning_compress.replacement.find import Layer, find_layers, plainly
from lightning_compress.replacement.plan import Plan, Replacement, carry_out, grouped

KIND = ConvBlockStructure.kind
Block = Literal["separable", "xception", "fire", "ghost", "shuffle"]
Init = Literal["data", "svd", "random"]
Patterns = str | Sequence[str]
FEW = 4  # input channels of a layer that reads an image


@dataclass(frozen=True)
class Wanted:
    """Which block convolutions become, and how it begins; the arguments of `substitute_convs`.

    Raises:
        ValueError: An argument is out of range.
    """

    block: Block = "separable"
    init: Init = "data"
    multiplier: int = 1
    squeeze: float = 0.125
    ratio: int = 2
    groups: int = 2

    def __post_init__(self) -> None:
        for name, known in (("block", get_args(Block)), ("init", get_args(Init))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        for name, least in (("multiplier", 1), ("ratio", 2), ("groups", 1)):
            whole_number(getattr(self, name), f"{name} must be an integer from {least} on", least=least)
        real_number(self.squeeze, "squeeze must be a share of the outputs, above 0 and up to 1", above=0, most=1)

    @property
    def options(self) -> dict[str, float]:
        """The numbers of blocks."""
        return {name: getattr(self, name) for name in ("multiplier", "squeeze", "ratio", "groups")}


@dataclass(frozen=True)
class Change:
    """What a convolution becomes.

    Attributes:
        numbers: The numbers of the block.
        before: The parameters of the convolution.
        after: Those of the block.
        values: The block's parameters and buffers by name; None: at random.
    """

    numbers: Mapping[str, int]
    before: int
    after: int
    values: Mapping[str, Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SubstitutionReport:
    """Which convolutions became blocks, and why others did not.

    Attributes:
        block: The name of the block.
        replaced: What became of each convolution, by path.
        left: Why each of the others is as it was, by path.
    """

    block: Block
    replaced: Mapping[str, Change]
    left: Mapping[str, str]

    @property
    def plan(self) -> Plan:
        """The plan with which these layers are replaced."""
        made = {path: Replacement(FORMS[self.block], one.numbers, one.values) for path, one in self.replaced.items()}
        return Plan(made, self.left)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return a row of words for each layer: its path, block, parameters before and after, and why not."""
        found = []
        for path, one in self.replaced.items():
            numbers = ", ".join(f"{name} {n}" for name, n in one.numbers.items())
            found.append((path, f"{self.block}, {numbers}", f"{one.before:,} -> {one.after:,}", ""))
        return [*found, *((path, "as it is", "", why) for path, why in self.left.items())]


def substitute_convs(
    network: nn.Module,
    example_inputs: ExampleInputs,
    *,
    block: Block = "separable",
    init: Init = "data",
    batches: Iterable[ExampleInputs] | None = None,
    multiplier: int = 1,
    squeeze: float = 0.125,
    ratio: int = 2,
    groups: int = 2,
    target: Patterns | None = None,
    exclude: Patterns = (),
) -> SubstitutionReport:
    """Replace convolutions of a network by blocks of cheaper ones, in place, close to what they compute.

    What a block is, `conv_substitution/blocks.py` says. The statistics of batch norms are computed anew from `batches`.
    Parameters are new: make an optimizer afterwards.

    Args:
        network: The network, changed in place; modules keep their identity, names and hooks.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        block: What convolutions become.
        init: How blocks begin: "data": fitted by least squares to what the layer computes for its inputs; "svd": to its
            weight alone; "random": torch's initialisation, which draws from the global generator.
        batches: What the network is called with, for the fit and for the norms; None: the example inputs.
        multiplier: Of separable and xception: how many terms.
        squeeze: Of fire: the squeezed channels, as a share of the outputs.
        ratio: Of ghost: 1 / ratio of the outputs are computed, and the others made of these.
        groups: Of shuffle: of its 1x1 convolutions.
        target: Names of layers, or glob patterns; () names none. By default all convolutions but those with up to
            four input channels. Those that a block can't stand in for, or that it would not make smaller, stay.
        exclude: Names of layers that stay, or glob patterns.

    Returns:
        What was replaced, and what was not, and why.

    Raises:
        ValueError: An argument is out of range, or no layer may be replaced. The network is as it was.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
        >>> report = substitute_convs(network, torch.randn(4, 1, 8, 8))
        >>> report.rows()[0]
        ('2', 'separable, terms 1', '576 -> 136', '')
        >>> report.left
        {'0': 'it has 1 input channel, too few to filter each by itself; target= can name it'}
        >>> network[2].depthwise
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), groups=8, bias=False)
    """
    wanted = Wanted(block, init, multiplier, squeeze, ratio, groups)
    known = [example_inputs] if batches is None else list(batches)
    report = plan_substitution(network, example_inputs, wanted, batches=known, target=target, exclude=exclude)
    with as_before_on_error(network):
        carry_out(network, report.plan, KIND)
        with plainly(network):
            call(network, example_inputs)
        recalibrate(network, known, batches=len(known))
    return report


def plan_substitution(
    network: nn.Module,
    example_inputs: ExampleInputs,
    wanted: Wanted,
    *,
    batches: Sequence[ExampleInputs],
    target: Patterns | None = None,
    exclude: Patterns = (),
) -> SubstitutionReport:
    """Return what `substitute_convs` would do, without doing it; on several ranks every one must call this."""
    layers, left = choose_convs(network, example_inputs, wanted, target=target, exclude=exclude)
    seen = {}
    if wanted.init == "data":
        seen = look(network, layers, example_inputs, batches, outputs=wanted.block == "ghost")
    changes = {}
    for path, layer in layers.items():
        sizes = layer.map.sizes
        numbers = numbers_for(sizes, wanted.block, **wanted.options)  # type: ignore[arg-type]
        begin = None
        if wanted.init != "random":
            known = seen[path] if wanted.init == "data" else white_noise(layer.map, wanted.block)
            try:
                begin = values(layer.map, wanted.block, numbers, known)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise ValueError(
                    f"A block {wanted.block!r} could not be fitted to {path or type(network).__name__!r}: {error} Its "
                    f"weight and its inputs must be finite; init='random' fits nothing."
                ) from error
        after = FORMS[wanted.block].parameters_of(sizes, numbers)
        changes[path] = Change(numbers, sizes.parameters, after, begin)
    return SubstitutionReport(wanted.block, changes, left)


def choose_convs(
    network: nn.Module,
    example_inputs: ExampleInputs,
    wanted: Wanted,
    *,
    target: Patterns | None = None,
    exclude: Patterns = (),
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the convolutions that become blocks, and why the others do not, both by path.

    Raises:
        ValueError: There is none.
    """
    if target is not None and not list(target):
        return {}, {}  # none is wanted
    found = find_layers(network, example_inputs)
    possible = {path: one for path, one in found.layers.items() if one.map.kind == "conv"}
    names = exact_patterns(f"{path}.weight".lstrip(".") for path in possible)
    wanted_names = select_parameters(network, target or names or None, exclude=exclude)
    others = (nn.Linear, nn.Embedding)
    left = {path: why for path, why in found.refused.items() if not isinstance(network.get_submodule(path), others)}
    layers, unwanted = {}, {}
    for path, layer in possible.items():
        if f"{path}.weight".lstrip(".") not in wanted_names:
            unwanted[path] = "it is not wanted by target= and exclude="
        elif (why := _why_not(layer, wanted, given=target is not None)) is not None:
            left[path] = why
        else:
            layers[path] = layer
    left |= _no_weights_of_convs(network, wanted_names, {*layers, *left}) if target is not None else {}
    left |= unwanted
    if not layers:
        reasons = "; ".join(grouped(left)[:5]) or "it has none"
        raise ValueError(f"No convolution of {type(network).__name__} can become a block {wanted.block!r}: {reasons}.")
    return layers, left


def _no_weights_of_convs(network: nn.Module, names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Return by path what target= names besides weights of convolutions."""
    found = {}
    for name in names:
        path, _, own = name.rpartition(".")
        if own != "weight":
            found[name] = "it is no weight, and a block stands in for a whole convolution"
        elif path not in known:
            found[path] = f"it is a {type(network.get_submodule(path)).__name__}, and no convolution"
    return found


def _why_not(layer: Layer, wanted: Wanted, *, given: bool) -> str | None:
    """Return why a convolution does not become a block, or None."""
    sizes, form = layer.map.sizes, FORMS[wanted.block]
    numbers = numbers_for(sizes, wanted.block, **wanted.options)  # type: ignore[arg-type]
    try:
        form.check(sizes, numbers)
    except ValueError as error:
        return str(error)
    if sizes.inputs <= FEW and not given:
        channels = f"{sizes.inputs} input channel{'s' * (sizes.inputs > 1)}"
        return f"it has {channels}, too few to filter each by itself; target= can name it"
    after = form.parameters_of(sizes, numbers)
    if after >= sizes.parameters:
        return f"the block would have {after:,} parameters, and it has {sizes.parameters:,}"
    return None
