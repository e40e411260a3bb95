"""Masks from scores: exactly as many entries stay as the amount asks for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.keep_largest import keep_largest
from lightning_compress.pruning.channels import Channels

Scope = Literal["global", "layer"]
Amount = float | Mapping[str, float]  # one for all, or of each tensor by its name


def prune_weights(
    scores: Mapping[str, Tensor],
    amount: Amount,
    *,
    scope: Scope = "global",
    absolute: bool = False,
    alive: Mapping[str, Tensor] | None = None,
    left: Mapping[str, int] | None = None,
    min_left: float = 0.0,
) -> dict[str, Tensor]:
    """Return masks (True stays) that drop the round(amount * N) lowest of N scores, over all tensors or in each.

    Args:
        scores: Importance per entry, by parameter name.
        amount: Fraction of the original entries that is dropped afterwards, those already dropped included; with
            scope="layer" also one for each tensor, by name.
        scope: "global" compares all entries with each other, "layer" drops the same fraction of each tensor.
        absolute: Whether the importance is the score's absolute value.
        alive: Masks of earlier events; entries that they drop stay dropped.
        left: The number of original entries that have left each tensor for good; they count as dropped.
        min_left: Smallest fraction of each tensor's original entries that stays with scope="global", as far as they are
            alive; see `least_left`.

    Raises:
        ValueError: A score is NaN.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 5.0, 2.0, 8.0]), "b": torch.tensor([7.0, 9.0])}
        >>> {name: mask.int().tolist() for name, mask in prune_weights(scores, 0.5).items()}
        {'a': [0, 0, 0, 1], 'b': [1, 1]}
        >>> {name: mask.int().tolist() for name, mask in prune_weights(scores, 0.5, scope="layer").items()}
        {'a': [0, 1, 0, 1], 'b': [0, 1]}
        >>> {name: mask.int().tolist() for name, mask in prune_weights(scores, 0.5, left={"b": 2}).items()}
        {'a': [0, 1, 0, 1], 'b': [1, 1]}
        >>> small = {"a": torch.tensor([0.1, 0.4, 0.3, 0.2]), "b": torch.arange(1.0, 7.0)}
        >>> {name: mask.int().tolist() for name, mask in prune_weights(small, 0.5, min_left=0.01).items()}
        {'a': [0, 1, 0, 0], 'b': [0, 0, 1, 1, 1, 1]}
    """
    if scope == "layer":
        amounts = amount if isinstance(amount, Mapping) else dict.fromkeys(scores, amount)
        return {
            name: _keep({name: score}, _drops([name], scores, amounts[name], alive, left), absolute, alive)[name]
            for name, score in scores.items()
        }
    assert not isinstance(amount, Mapping), "with an amount for each tensor, tensors are not compared"
    n_drop = _drops(scores, scores, amount, alive, left)
    masks = _keep(scores, n_drop, absolute, alive)
    counts = {name: score.numel() + (left or {}).get(name, 0) for name, score in scores.items()}
    floors = {
        name: min(least, _alive(scores[name], alive, name))
        for name, least in least_left(counts, amount, min_left).items()
    }
    open_names, dropped = list(scores), 0
    while short := [name for name in open_names if int(masks[name].sum()) < floors[name]]:
        for name in short:  # this tensor keeps its best entries, and the others lose more in its place
            open_names.remove(name)
            dropped += scores[name].numel() - floors[name]
            masks |= _keep({name: scores[name]}, scores[name].numel() - floors[name], absolute, alive)
        others = {name: scores[name] for name in open_names}
        least = sum(one.numel() - _alive(one, alive, name) for name, one in others.items())
        most = sum(one.numel() for one in others.values())
        masks |= _keep(others, min(max(n_drop - dropped, least), most), absolute, alive)
    return masks


def least_left(counts: Mapping[str, int], amount: float, min_left: float) -> dict[str, int]:
    """Return the smallest number of entries of every tensor that stay when `amount` of all entries is dropped.

    It is the fraction `min_left` of a tensor's entries, or half of the fraction that stays of all entries if that is
    less; and at least one entry, unless half of all entries that stay are fewer than the tensors. So these floors leave
    room for the amount.

    Args:
        counts: The number of original entries of each tensor, by name.
        amount: As for `prune_weights`.
        min_left: As for `prune_weights`.

    Example:
        >>> least_left({"a": 1000, "b": 10}, 0.9, 0.01), least_left({"a": 1000, "b": 10}, 0.999, 0.01)
        ({'a': 10, 'b': 1}, {'a': 0, 'b': 0})
    """
    total = sum(counts.values())
    one = min_left > 0 and 2 * len(counts) <= total - _count(amount, total)
    fraction = min(min_left, (1 - amount) / 2)
    return {name: max(int(count * fraction + 1e-9), int(one)) for name, count in counts.items()}


def _alive(score: Tensor, alive: Mapping[str, Tensor] | None, name: str) -> int:
    return score.numel() if alive is None else int(alive[name].sum())


def _drops(
    names: Iterable[str],
    scores: Mapping[str, Tensor],
    amount: float,
    alive: Mapping[str, Tensor] | None,
    left: Mapping[str, int] | None,
) -> int:
    """Return how many of the present entries must be dropped, so that `amount` of the original ones is dropped."""
    names = list(names)
    gone = sum((left or {}).get(name, 0) for name in names)
    dropped = 0 if alive is None or gone == 0 else sum(int((~alive[name]).sum()) for name in names)
    return max(_count(amount, sum(scores[name].numel() for name in names) + gone) - gone, dropped)


def prune_channels(
    scores: Mapping[str, Tensor],
    amount: float,
    *,
    scope: Scope = "global",
    alive: Mapping[str, Tensor] | None = None,
    costs: Mapping[str, float] | None = None,
    min_channels: int = 1,
    round_to: int = 1,
) -> dict[str, Tensor]:
    """Return a mask (True stays) over the channels of each group; the best channels of a group always stay.

    Args:
        scores: Importance per channel, by group name, each of shape (channels,).
        amount: Fraction of all these channels that is dropped afterwards; fewer if `round_to` keeps more.
        scope: As for `prune_weights`.
        alive: As for `prune_weights`.
        costs: The cost of one channel of each group, which divides the importance before groups are compared.
        min_channels: Smallest number of channels of each group that stay.
        round_to: The number of channels that stay is rounded up to a multiple of this number.

    Raises:
        ValueError: A score is NaN.

    Example:
        >>> scores = {"conv1": torch.tensor([1.0, 2.0, 3.0]), "conv2": torch.tensor([0.1, 0.2, 9.0])}
        >>> {name: mask.int().tolist() for name, mask in prune_channels(scores, 0.5).items()}
        {'conv1': [0, 1, 1], 'conv2': [0, 0, 1]}
        >>> {name: mask.int().tolist() for name, mask in prune_channels(scores, 0.5, min_channels=2).items()}
        {'conv1': [0, 1, 1], 'conv2': [0, 1, 1]}
    """
    guarded, protected = {}, {}
    for name, score in scores.items():
        n_alive = score.numel() if alive is None else int(alive[name].sum())
        least = min(max(min_channels, 1), n_alive)
        present = score if alive is None else score.masked_fill(~alive[name], -torch.inf)
        best = present.argsort(descending=True, stable=True)[:least]
        cost = costs[name] if costs is not None and scope == "global" else 1.0
        # A costly channel is worth less, also if its score is negative. A NaN stays, so that it raises an error.
        worth = torch.where(score >= 0, score / cost, score * cost)
        guarded[name] = worth.index_fill(0, best, torch.inf).where(~score.isnan(), score)
        protected[name] = least
    masks: dict[str, Tensor] = {}
    if scope == "layer":
        for name, score in guarded.items():
            masks |= _keep({name: score}, _all_but(protected[name], amount, score.numel(), name), False, alive)
    else:
        channels = sum(score.numel() for score in guarded.values())
        masks = _keep(guarded, _all_but(sum(protected.values()), amount, channels, "all layers"), False, alive)
    if round_to > 1:
        for name, mask in masks.items():
            masks[name] = _rounded_up(mask, guarded[name], None if alive is None else alive[name], round_to)
    return masks


def _rounded_up(mask: Tensor, score: Tensor, alive: Tensor | None, multiple: int) -> Tensor:
    """Give back the best of the dropped channels, until the number that stays is a multiple."""
    candidates = score.masked_fill(mask | (~alive if alive is not None else torch.zeros_like(mask)), -torch.inf)
    missing = min(-int(mask.sum()) % multiple, int((candidates > -torch.inf).sum()))
    mask = mask.clone()
    mask[candidates.argsort(descending=True, stable=True)[:missing]] = True
    return mask


def expand(channels: Sequence[Channels], keep: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks over parameters that silence the dropped channels, in all slices that make them.

    Args:
        channels: The channels of each group, with their members.
        keep: For each group a mask over its channels, True stays.
        shapes: The parameters, by name, whose shapes and devices the masks get.
    """
    masks: dict[str, Tensor] = {}
    for group in channels:
        if group.name not in keep:
            continue
        gone = ~keep[group.name]
        for member in group.members:
            parameter = shapes[member.tensor]
            mask = masks.setdefault(member.tensor, torch.ones_like(parameter, dtype=torch.bool))
            mask.index_fill_(member.dim, member.index[gone.to(member.index.device)].flatten().to(mask.device), False)
    return masks


def _keep(
    scores: Mapping[str, Tensor], n_drop: int, absolute: bool, alive: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    names = list(scores)
    present = None if alive is None else [alive[name] for name in names]
    masks = keep_largest([scores[name] for name in names], n_drop, absolute=absolute, alive=present, names=names)
    return dict(zip(names, masks, strict=True))


def _count(amount: float, total: int) -> int:
    return round(amount * total)


def _all_but(protected: int, amount: float, total: int, where: str) -> int:
    wanted, possible = _count(amount, total), total - protected
    if wanted > possible:
        warnings.warn(
            f"amount={amount} asks for {wanted} of {total} channels of {where}; {possible} are removed, because "
            f"some channels of every layer stay.",
            stacklevel=3,
        )
    return min(wanted, possible)
