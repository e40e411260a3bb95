"""Exit heads: small modules that map the output of a layer inside a network to the network's kind of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.hooks import hooked
from lightning_compress.core.side_outputs import SideReader
from lightning_compress.early_exit.rules import ExitRule

HEADS = "exit_heads"  # the name of a network's child that holds its heads
Kind = Literal["map", "tokens", "per_token", "vector"]
_MAP_SIZE = 4  # the height and width to which feature maps are pooled
_MAX_POOLS: dict[int, Callable[..., Any]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}
_AVERAGE_POOLS: dict[int, Callable[..., Any]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class MapHead(nn.Module):
    """Classify a feature map: a learned mix of maximum and average pooling, and one linear layer.

    With the feature map h, pooled to at most 4 positions in each direction: linear(a max(h) + (1 - a) mean(h)), where
    the number a is learned, from 1/2.

    Args:
        shape: Of the feature map of one sample, channels first: (C, L), (C, H, W) or (C, D, H, W).
        num_classes: How many logits.

    Shapes:
        input (N, C, ...), output (N, num_classes).

    Paper:
        Kaya, Hong, Dumitras, Shallow-deep networks (1810.07052), section 3.2, "feature reduction".

    Example:
        >>> MapHead((8, 14, 14), 10)(torch.zeros(2, 8, 14, 14)).shape
        torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.size = tuple(min(_MAP_SIZE, extent) for extent in shape[1:])
        self.mix = nn.Parameter(torch.tensor(0.5))
        positions = int(torch.tensor(self.size).prod())
        self.linear = nn.Linear(shape[0] * positions, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        directions = features.dim() - 2
        if directions == 2:
            features = features.contiguous(memory_format=torch.channels_last)  # pools in 1/2 to 1/10 of the time
        largest = _MAX_POOLS[directions](features, self.size)
        average = _AVERAGE_POOLS[directions](features, self.size)
        mix = self.mix.to(features.dtype)
        logits: Tensor = self.linear((mix * largest + (1.0 - mix) * average).flatten(1))
        return logits


class TokenHead(nn.Module):
    """Classify a sequence of tokens: layer normalisation, then one linear layer over the first token and their mean.

    Args:
        width: Numbers per token.
        num_classes: How many logits.

    Shapes:
        input (N, T, width), output (N, num_classes). Padded tokens count in the mean.

    Example:
        >>> TokenHead(16, 10)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.norm(features)
        logits: Tensor = self.linear(torch.cat([tokens[:, 0], tokens.mean(1)], dim=-1))
        return logits


class PerTokenHead(nn.Module):
    """Map every token to logits: layer normalisation and one linear layer.

    Args:
        width: Numbers per token.
        num_classes: How many logits.

    Shapes:
        input (N, T, width), output (N, T, num_classes).

    Example:
        >>> PerTokenHead(16, 10)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(features))
        return logits


def kind_of_head(shape: Sequence[int], logits: Sequence[int], layer: str, *, is_1d: bool = False) -> Kind:
    """Return which head reads the output of a layer.

    Args:
        shape: Of the layer's output for one sample.
        logits: Shape of the network's logits for one sample.
        layer: The layer's name, for the message.
        is_1d: Whether an output of two dimensions is a feature map (C, L), and not a sequence of tokens (T, C).

    Raises:
        ValueError: None of them does.

    Example:
        >>> kind_of_head((8, 14, 14), (10,), "net.block1"), kind_of_head((5, 16), (10,), "encoder.0")
        ('map', 'tokens')
    """
    if len(logits) == 2 and len(shape) == 2 and shape[0] == logits[0]:
        return "per_token"
    kinds: dict[int, Kind] = {1: "vector", 2: "tokens", 3: "map", 4: "map"}
    if len(logits) != 1 or len(shape) not in kinds:
        raise ValueError(
            f"No head maps the output of {layer!r}, of shape (N, {', '.join(map(str, shape))}), to logits of shape "
            f"(N, {', '.join(map(str, logits))}): pass head= with a function of features and num_classes that returns "
            f"a module, or take another layer."
        )
    return "map" if is_1d and len(shape) == 2 else kinds[len(shape)]


def build_head(kind: Kind, shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return a head for layers whose output has this shape for one sample.

    A vector gets a linear layer alone: a norm would count the channels that pruning wants to cut.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"A head is one of {', '.join(get_args(Kind))}; got {kind!r}.")
    if kind == "map":
        return MapHead(shape, num_classes)
    heads: dict[str, Callable[[int, int], nn.Module]] = {
        "tokens": TokenHead,
        "per_token": PerTokenHead,
        "vector": nn.Linear,
    }
    return heads[kind](shape[-1], num_classes)


class ExitHeads(SideReader):
    """The heads of a network, as its child `exit_heads`: its children are the heads, "1", "2", ... in their order.

    It returns what it is called with, so that a network that runs its children one after another stays as it was.

    Args:
        layers: The layer that each head reads, by qualified name within the network.
        heads: One for each layer.
        described: Kind and shape of each head that `build_head` made; None for a module of the user's.

    Attributes:
        layers: As given.
        num_classes: How many logits each head has.
        rules: When a sample leaves, by the way in which the network runs: "" as it is, "width 0.5" and so on.
    """

    def __init__(
        self,
        layers: Sequence[str],
        heads: Sequence[nn.Module],
        *,
        num_classes: int,
        described: Sequence[tuple[Kind, tuple[int, ...]] | None],
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.num_classes = num_classes
        self.described = tuple(described)
        self.rules: dict[str, ExitRule] = {}
        for number, head in enumerate(heads, start=1):
            self.add_module(str(number), head)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def rule(self) -> ExitRule | None:
        """When a sample leaves the network as it is; None before it was calibrated."""
        return self.rules.get("")

    @rule.setter
    def rule(self, rule: ExitRule | None) -> None:
        self.rules.pop("", None)
        if rule is not None:
            self.rules[""] = rule

    def forward(self, unchanged: Tensor) -> Tensor:
        return unchanged

    @contextmanager
    def reading(self, network: nn.Module, found: list[Tensor]) -> Iterator[None]:
        heads = self.by_layer()
        with reading(network, self.layers, lambda layer, features: found.append(heads[layer](features))):
            yield

    def by_layer(self) -> dict[str, nn.Module]:
        """Return the heads by the names of their layers, in their order."""
        return {layer: self.get_submodule(str(number)) for number, layer in enumerate(self.layers, start=1)}


def heads_of(network: nn.Module) -> ExitHeads | None:
    """Return the heads of a network; None if it has none."""
    found = network._modules.get(HEADS)
    return found if isinstance(found, ExitHeads) else None


def check_finite(heads: ExitHeads) -> None:
    """Refuse heads that training has destroyed.

    Raises:
        ValueError: A head has a weight that is no finite number.
    """
    for number, (layer, head) in enumerate(heads.by_layer().items(), start=1):
        for name, parameter in head.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"The head of exit {number}, after {layer!r}, has {name} with values that are no finite numbers: "
                    f"its training diverged. Train with a smaller learning rate; heads alone (train='frozen') with "
                    f"Adam at 0.001."
                )


@contextmanager
def reading(network: nn.Module, layers: Sequence[str], act: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call `act` with the name and the output of each layer while the block runs a network; once in each forward pass.

    An activation in place may follow the layer: what `act` gets is a copy. What it returns, if not None, is what the
    network goes on with.

    Raises:
        ValueError: There is no such layer, it ran twice, or it returned no tensor.
    """
    seen: set[str] = set()

    def hook_of(layer: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            if layer in seen:
                raise ValueError(f"The exit layer {layer!r} ran twice in one forward pass: name one that runs once.")
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"The exit layer {layer!r} returns a {type(output).__name__}, and no tensor: name a layer inside "
                    f"it, or after it, that returns one."
                )
            seen.add(layer)
            return act(layer, output.clone())

        return hook

    handles = [layer_of(network, layer).register_forward_hook(hook_of(layer)) for layer in layers]
    handles.append(network.register_forward_pre_hook(lambda *_: seen.clear()))
    with hooked(*handles):
        yield


def layer_of(network: nn.Module, layer: str) -> nn.Module:
    """Return a layer by its qualified name.

    Raises:
        ValueError: The network has none of that name.
    """
    try:
        if not layer:
            raise AttributeError
        return network.get_submodule(layer)
    except AttributeError as error:
        last = layer.rpartition(".")[2]
        names = [name for name, _ in network.named_modules() if name and not name.startswith(HEADS)]
        near = [name for name in names if name.rpartition(".")[2] == last] or names
        raise ValueError(
            f"exits has {layer!r}, which is no layer of {type(network).__name__}; it has "
            f"{', '.join(map(repr, near[:5]))}."
        ) from error


def make_heads(
    layers: Sequence[str],
    features: Mapping[str, Tensor],
    logits: Tensor,
    *,
    num_classes: int,
    head: Any = "auto",
    is_1d: Callable[[str], bool] = lambda layer: False,
) -> ExitHeads:
    """Return heads that read layers.

    Args:
        layers: Their names, in any order; the exits are numbered in the order in which the layers ran.
        features: What they returned, in that order.
        logits: What the network returned for the same batch.
        num_classes: How many logits a head has.
        head: "auto" and the kinds of `build_head`; a function of features and num_classes that returns a module; or a
            sequence of modules, one for each of `layers`.
        is_1d: Says of a layer whether it returns feature maps of one direction, as Conv1d does, and not tokens.

    Raises:
        ValueError: A layer did not run, `num_classes` is not that of the logits, or no head reads a layer.
    """
    for layer in layers:
        if layer not in features:
            raise ValueError(f"The exit layer {layer!r} did not run in the network's forward pass.")
    if logits.dim() < 2 or logits.shape[-1] != num_classes:
        raise ValueError(
            f"num_classes={num_classes}, and the network returns logits of shape {tuple(logits.shape)}, whose last "
            f"dimension counts the classes."
        )
    ordered = [layer for layer in features if layer in layers]
    made: list[nn.Module] = []
    described: list[tuple[Kind, tuple[int, ...]] | None] = []
    for layer in ordered:
        shape = tuple(features[layer].shape[1:])
        if isinstance(head, Sequence) and not isinstance(head, str):
            made.append(head[list(layers).index(layer)])
            described.append(None)
        elif callable(head):
            made.append(head(features[layer], num_classes))
            described.append(None)
        else:
            kind: Kind = head
            if head == "auto":
                kind = kind_of_head(shape, tuple(logits.shape[1:]), layer, is_1d=is_1d(layer))
            made.append(build_head(kind, shape, num_classes))
            described.append((kind, shape))
    for layer, one in zip(ordered, made, strict=True):
        one.to(device=features[layer].device)
        _check_output(one, features[layer], logits, layer)
    return ExitHeads(ordered, made, num_classes=num_classes, described=described)


def _check_output(head: nn.Module, features: Tensor, logits: Tensor, layer: str) -> None:
    training = head.training
    try:
        with torch.no_grad():
            found = head.eval()(features)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"The head of {layer!r}, a {type(head).__name__}, can't read its output of shape "
            f"{tuple(features.shape)}: {error}"
        ) from error
    finally:
        head.train(training)
    if not isinstance(found, Tensor) or found.shape != logits.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"The head of {layer!r} returns {shape}, and the network {tuple(logits.shape)}: both must be the same kind "
            f"of logits."
        )
