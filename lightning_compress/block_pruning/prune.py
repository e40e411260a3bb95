"""Take residual blocks out of a network for good, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import isnan, nan

import torch
from torch import nn

from lightning_compress.block_pruning.influence import block_influence
from lightning_compress.block_pruning.plan import BlockError, Place, find_places, without
from lightning_compress.block_pruning.record import note_depth
from lightning_compress.block_pruning.stand_in import replace, stand_ins
from lightning_compress.channels.optimizer_state import check_forgettable, forget_parameters
from lightning_compress.channels.sandbox import undisturbed
from lightning_compress.core.evaluation import renew_caches
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.given import real_number
from lightning_compress.core.input_hooks import take_away
from lightning_compress.core.outputs import TOLERANCES, compare, run
from lightning_compress.core.tensors import named_tensors
from lightning_compress.measure.macs import count_macs
from lightning_compress.stages.blocks import Block, chosen_blocks, find_blocks

_STAYS = 0.01  # share of the blocks' MACs, above which those that the network's own code computes are told
_ROUNDING = 1e-9  # of a share of MACs


def prune_blocks(
    network: nn.Module,
    example_inputs: ExampleInputs,
    *,
    remove: Sequence[str] | None = None,
    amount: float | None = None,
    scores: Mapping[str, float] | None = None,
    blocks: Sequence[str] | None = None,
    output: str | int | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> nn.Module:
    """Take residual blocks out of a network for good: those that `remove` names, or those that matter least.

    A block's branch leaves with its parameters, and its shortcut stays. Modules keep their names and their order; where
    the code around a block still calls its modules, they return their input or zeros, and cost nothing. The function
    checks that the network computes exactly what it did with zeros in the branches' places, and else puts everything
    back. `removed_blocks(network)` says what has left. State dicts say so as well: `load_compressed` takes the same
    blocks out of a network of the dense class.

    Args:
        network: The network, changed in place.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        remove: The names of the blocks that leave, or glob patterns.
        amount: Instead of `remove`: the share of the blocks' multiply-accumulates that leaves, at most. Blocks with the
            smallest scores leave first.
        scores: With `amount`: the importance of each block, by name. By default its influence on the example inputs:
            1 - cos(x, x + F(x)).
        blocks: With `amount`: names of the blocks among which to choose, or glob patterns; by default all whose
            shortcut has no layers.
        output: Which tensor of the network's output is the prediction: a key, position or attribute.
        optimizers: Optimizers of the network's parameters. They keep their state of those that stay.
        copies: Modules with the same submodules, such as a moving average, which lose the same blocks.

    Returns:
        The network.

    Raises:
        TypeError: Not exactly one of `remove` and `amount` is given.
        ValueError: A block is unknown, or can't leave; the message has the reason. The network is as it was.

    References:
        Men et al. 2024, "ShortGPT", for the influence of blocks.

    Example:
        >>> from lightning_compress.baselines.networks import ResNet20
        >>> net, x = ResNet20(width=4), torch.zeros(2, 3, 32, 32)
        >>> net = prune_blocks(net, x, remove=["stages.0.1", "stages.2.1"])
        >>> net.stages[0][1]
        StandIn(ResidualBlock of block 'stages.0.1', returns its input 0)
        >>> list(removed_blocks(net))
        ['stages.0.1', 'stages.2.1']
    """
    if (remove is None) == (amount is None):
        raise TypeError(
            f"Name the blocks that leave, or say how much leaves: prune_blocks(network, example_inputs, "
            f"remove=['layer1.1']) or prune_blocks(network, example_inputs, amount=0.3). Got remove={remove} and "
            f"amount={amount}."
        )
    if amount is not None:
        check_amount(amount)
    found = find_blocks(network, example_inputs, output=output)
    if remove is not None:
        leaving = chosen_blocks(found, remove)
    else:
        assert amount is not None
        among = chosen_blocks(found, blocks)
        known = block_influence(network, [example_inputs], among) if scores is None else scores
        leaving = least_important(among, known, amount)
    take_out(network, example_inputs, leaving, optimizers=optimizers, copies=copies)
    return network


def least_important(blocks: Sequence[Block], scores: Mapping[str, float], amount: float) -> tuple[Block, ...]:
    """Return the blocks with the smallest scores that hold at most a share of all blocks' multiply-accumulates.

    A block that is too large is left out, and the next ones are tried.

    Raises:
        ValueError: The amount is no share, a block has no score, or every block is too large.
    """
    check_amount(amount)
    if lacking := [one.name for one in blocks if isnan(scores.get(one.name, nan))]:
        raise ValueError(f"scores has no number for {', '.join(lacking)}: expected one for each block.")
    left = amount * sum(one.macs for one in blocks) * (1 + _ROUNDING)
    if amount > 0 and (smallest := min(one.macs for one in blocks)) > left:
        raise ValueError(
            f"amount={amount} is less than the smallest block has of the blocks' multiply-accumulates, "
            f"{smallest / sum(one.macs for one in blocks):.3g}: raise it."
        )
    chosen = set()
    for one in sorted(blocks, key=lambda block: scores[block.name]):
        if one.macs <= left:
            chosen.add(one.name)
            left -= one.macs
    return tuple(one for one in blocks if one.name in chosen)


def check_amount(amount: float) -> None:
    """Raise a ValueError unless the amount is a share."""
    real_number(amount, "amount must be a share of the blocks' multiply-accumulates, 0 to 1", least=0, most=1)


@torch.inference_mode(False)  # tensors that are made in inference mode can never be trained
def take_out(
    network: nn.Module,
    example_inputs: ExampleInputs,
    blocks: Sequence[Block],
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> frozenset[str]:
    """Take blocks out of a network, in place, and their parameters out of its optimizers.

    Args:
        network: The network.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        blocks: Of the network, as `find_blocks` has found them.
        optimizers: Optimizers of the network's parameters. They keep their state of those that stay.
        copies: Modules with the same submodules, such as a moving average, which lose the same blocks.

    Returns:
        The names of the parameters and buffers that have left.

    Raises:
        BlockError: A block can't leave. The network is as it was.
        ValueError: An optimizer keeps state for several parameters together.
    """
    optimizers, copies = list(optimizers), list(copies)
    if not blocks:
        return frozenset()
    for optimizer in optimizers:
        check_forgettable(optimizer)
    places = find_places(network, example_inputs, blocks)
    before = named_tensors(network)
    with undisturbed(network):
        cost, _ = count_macs(network, example_inputs)
        with without(network, blocks):
            expected = run(network, example_inputs)
    with ExitStack() as undo:
        for module in (network, *copies):
            for one in places:
                undo.callback(_replaced(module, one))
        with undisturbed(network):
            got = run(network, example_inputs)
            stays = sum(block.macs for block in blocks) - (cost - count_macs(network, example_inputs)[0])
        dtype = next((one.dtype for one in expected if one.is_floating_point()), torch.float32)
        if (wrong := compare(got, expected, TOLERANCES.get(dtype, 1e-3))) is not None:
            names = ", ".join(repr(one.name) for one in blocks)
            raise BlockError(
                f"Without {names} the network does not compute what it does with zeros in their place, so nothing was "
                f"taken out: {wrong}."
            )
        undo.pop_all()
    for module in (network, *copies):
        for one in places:
            stand_in = module.get_submodule(one.path)
            take_away(stand_in)  # what quantized the inputs of a layer that has left
            note_depth(stand_in)
        renew_caches(module)
    after = {id(one) for one in named_tensors(network).values()}
    left = {name: one for name, one in before.items() if id(one) not in after}
    for optimizer in optimizers:
        forget_parameters(optimizer, left.values())
    if stays > _STAYS * sum(block.macs for block in blocks):
        warnings.warn(
            f"{', '.join(block.name for block in blocks)} left {type(network).__name__}, and {stays:,} of their "
            f"multiply-accumulates stay: its code computes them itself, outside of modules, now with zeros.",
            stacklevel=2,
        )
    torch.clear_autocast_cache()  # it holds weights that have left
    return frozenset(left)


def within(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a path, or None."""
    return dict(module.named_modules()).get(path)


def _replaced(module: nn.Module, place: Place) -> Callable[[], None]:
    return replace(module.get_submodule(place.path), place.described, block=place.block, macs=place.macs)


def removed_blocks(network: nn.Module) -> dict[str, int]:
    """Return the names of the blocks that have left a network, with the multiply-accumulates that each has saved.

    Blocks that have left together, with one module, have one entry with all names.
    """
    found: dict[str, int] = {}
    for one in stand_ins(network).values():
        found[one.block] = found.get(one.block, 0) + one.macs
    return found
