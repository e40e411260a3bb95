"""Compare layers of the student with layers of the teacher while both networks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_compress.core.given import real_number
from lightning_compress.core.hooks import hooked
from lightning_compress.core.losses import cosine_loss
from lightning_compress.core.outputs import select_output
from lightning_compress.distillation.hint_losses import (
    attention_transfer_loss,
    fitnet_loss,
    left_out,
    regressor,
    selected,
)

Side = Literal["student", "teacher"]
HintLoss = Literal["fitnet", "attention_transfer", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Hint:
    """A hint: a layer of the student learns from a layer of the teacher.

    Attributes:
        student: The layer's qualified name in the student.
        teacher: The layer's qualified name in the teacher, as the user has passed it.
        loss: The name of the loss that compares the outputs of the two layers.
        weight: The factor of the loss.
        regressor: Whether an additional layer maps the student's features to the teacher's shape.
        output: Key, position or attribute of the features, where the layers return more than a tensor.
        channel_dim: Dimension of the channels; None: 1, except for features of three dimensions, which need it.
    """

    student: str
    teacher: str
    loss: HintLoss = "fitnet"
    weight: float = 1.0
    regressor: bool = False
    output: str | int | None = None
    channel_dim: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Hint:
        """Make a hint from a mapping.

        Raises:
            ValueError: Keys are missing or unknown, the loss is unknown, or the weight is negative.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(known) or not {"student", "teacher"} <= set(given):
            raise ValueError(
                f"A hint has student= and teacher=, names of layers, and, if wanted, {', '.join(known[2:])}; got "
                f"{given!r}."
            )
        made = cls(**given)
        if made.loss not in get_args(HintLoss):
            raise ValueError(f"The loss of a hint is one of {', '.join(get_args(HintLoss))}; got {made.loss!r}.")
        real_number(made.weight, f"The weight of a hint is 0 or more, also that of {made.student!r}", least=0)
        return made

    def make_regressor(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """Return a layer that maps features of the student's shape to the teacher's shape.

        Raises:
            ValueError: No such layer exists.
        """
        try:
            return regressor(student.shape, teacher.shape, channel_dim=self.channel_dim)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error

    def between(
        self, student: Tensor, teacher: Tensor, regressor: nn.Module | None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the weighted loss between the features of a batch.

        Args:
            student: The features of the student's layer.
            teacher: The features of the teacher's layer.
            regressor: The layer that maps the student's features to the teacher's shape, or None.
            mask: True where a position of the output counts. Features with other positions ignore the mask.

        Raises:
            ValueError: The features don't fit.
        """
        try:
            return self.weight * self._between(student, teacher, regressor, mask)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error

    def _between(self, student: Tensor, teacher: Tensor, regressor: nn.Module | None, mask: Tensor | None) -> Tensor:
        if regressor is not None:
            out = None if mask is None else left_out(mask, student.shape, self.channel_dim)
            student = _regressed(student if out is None else selected(student, out), regressor)
        out = None if mask is None else left_out(mask, student.shape, self.channel_dim)
        if self.loss == "fitnet":
            return fitnet_loss(student, teacher, left_out=out)
        if self.loss == "attention_transfer":
            if self.channel_dim not in (None, 1):
                student, teacher = (one.movedim(self.channel_dim, 1) for one in (student, teacher))
                out = None if out is None else out.movedim(self.channel_dim, 1)
            return attention_transfer_loss(student, teacher, left_out=out)
        if self.channel_dim is None and student.dim() == 3:
            raise ValueError(
                f"features of shape {tuple(student.shape)} need channel_dim=-1 for tokens (N, T, C), or 1 for "
                f"(N, C, L)."
            )
        return cosine_loss(student, teacher, class_dim=self.channel_dim or 1, mask=None if out is None else mask)

    def __str__(self) -> str:
        return f"Hint {self.student!r} from {self.teacher!r}"


def _regressed(student: Tensor, regressor: nn.Module) -> Tensor:
    weight = regressor.get_parameter("weight")
    channels = student.shape[-1 if weight.dim() == 2 else 1]
    if channels != weight.shape[1]:
        raise ValueError(
            f"the regressor was made for {weight.shape[1]} channels of the student, and there are {channels} now: a "
            f"layer that is cut during the fit, or has fewer channels at a smaller width, can be compared by "
            f"attention_transfer only."
        )
    mapped: Tensor = regressor(student)
    return mapped


@contextmanager
def features(root: nn.Module, hints: Mapping[str, Hint], who: Side) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the hinted layers of one network, by hint, while the block runs the network.

    Raises:
        ValueError: There is no such layer, it ran twice, or it returned no tensor.
    """
    found: dict[str, Tensor] = {}
    with watching(root, hints, who, found.__setitem__):
        yield found


@contextmanager
def watching(
    root: nn.Module, hints: Mapping[str, Hint], who: Side, act: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `act` with the key of each hint and its layer's output, once, while the block runs the network."""
    seen: set[str] = set()

    def hook_of(key: str, hint: Hint) -> Callable[..., None]:
        name = getattr(hint, who)

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if key in seen:
                raise ValueError(
                    f"{hint}: {name!r} of the {who} ran twice in one forward pass; name a layer that runs once."
                )
            seen.add(key)
            # A copy, because an in-place activation may follow.
            act(key, select_output(output, hint.output, f"{name!r} of the {who}").clone())

        return hook

    layers = [_layer(root, getattr(hint, who), hint, who) for hint in hints.values()]
    hooks = [hook_of(key, hint) for key, hint in hints.items()]
    with hooked(*(layer.register_forward_hook(hook) for layer, hook in zip(layers, hooks, strict=True))):
        yield


def _layer(root: nn.Module, name: str, hint: Hint, who: str) -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        names = [one for one, _ in root.named_modules() if one]
        near = [one for one in names if one.rpartition(".")[2] == name.rpartition(".")[2]] or names
        raise ValueError(
            f"{hint}: the {who} {type(root).__name__} has no layer {name!r}; it has {', '.join(map(repr, near[:5]))}."
        ) from error
