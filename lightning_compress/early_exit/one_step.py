"""One step of a module with exits: the real step, in which the network runs, and the replays with the exits' logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_compress.core.outputs import select_output
from lightning_compress.early_exit.gradients import scale_gradient
from lightning_compress.early_exit.heads import ExitHeads, reading
from lightning_compress.trainer.capture import captured
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.replay import replaying, returning, with_output
from lightning_compress.trainer.replica import Before, Replica
from lightning_compress.trainer.unwrap import SLOT

Gradient = Literal["full", "equilibrium", "stop"]


class OneStep:
    """A batch on its way through a module with exits.

    Args:
        module: The wrapper.
        heads: Of its network.
        network: Dotted path of the network.
        output: What picks the logits from its output.
        gradient: What exits do to the network before them.
        replicas: Of each exit, by the label of what its replay logs.
        batch: The step's arguments, positional and by name.

    Attributes:
        inputs: What the network was called with.
        called: Whether the step has called it.
        was_called: Raises an error if it has not.
    """

    def __init__(
        self,
        module: LightningModule,
        heads: ExitHeads,
        network: str,
        output: str | int | None,
        gradient: Gradient,
        replicas: Mapping[str, Replica],
        batch: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self.module, self.heads, self.path, self.picks, self.gradient = module, heads, network, output, gradient
        self.network = resolve_network(module, network)
        self.replicas = replicas
        self.before = Before(module, backbone(self.network), replicas.values(), batch)
        self.features: dict[str, Tensor] = {}
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.output: Any = None
        self.called = False
        self.was_called: Callable[[], None] = lambda: None

    @contextmanager
    def real_step(self) -> Iterator[None]:
        """Catch the features of exit layers, and the network's output, while the block runs the user's step."""
        with ExitStack() as stack:
            stack.enter_context(also_logged(self.module, full_label(self.heads)))
            stack.enter_context(reading(backbone(self.network), self.heads.layers, self._read))
            self.was_called = stack.enter_context(captured(self.module, self.path, self._begin, self._end))
            yield
        self.before.check_batch()
        self.before.after_real_step()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before.check_batch()
        self.inputs = (args, kwargs)

    def _end(self, output: Any) -> None:
        self.before.look_at_batch()  # the network, which a replay does not run, may write into its inputs
        self.output, self.called = output, True

    def _read(self, layer: str, features: Tensor) -> Tensor | None:
        """Keep the features for the exit's head; return what the network goes on with, if that is another tensor."""
        if self.gradient == "stop":
            self.features[layer] = features.detach()
        elif self.gradient == "equilibrium" and features.requires_grad:
            left = len(self.heads) + 1 - self.heads.layers.index(layer)  # classifiers from here on
            self.features[layer] = scale_gradient(features, 1.0 / left)
            return scale_gradient(features, (left - 1.0) / left)
        else:
            self.features[layer] = features
        return None

    @property
    def logits(self) -> Tensor:
        """The full network's."""
        return select_output(self.output, self.picks, "The network")

    def exits(self) -> list[Tensor]:
        """Return the logits of each exit."""
        found = []
        for layer, head in self.heads.by_layer().items():
            if layer not in self.features:
                raise ValueError(f"The exit layer {layer!r} did not run in the network's forward pass.")
            found.append(head(self.features[layer]))
        return found

    def replayed(self, label: str, logits: Tensor, run: Callable[..., Any]) -> Any:
        """Return what the user's step returns with an exit's logits as the network's output.

        Args:
            label: Of the exit.
            logits: Of the exit.
            run: The step.
        """
        output = with_output(self.output, self.picks, logits, "The network")
        with (
            replaying(self.module, label, self.replicas[label], self.before),
            returning(self.network, output),
        ):
            args, kwargs = self.before.batch()
            return run(*args, **kwargs)


@contextmanager
def also_logged(module: LightningModule, folder: str) -> Iterator[None]:
    """Log what the block logs under a second folder as well."""
    inside: Any = getattr(module, SLOT)
    before, inside.second_label = inside.second_label, f"{folder}/"
    try:
        yield
    finally:
        inside.second_label = before


def exit_labels(heads: ExitHeads) -> list[str]:
    """Return the folders of what exits log."""
    return [f"exit{number}" for number in range(1, len(heads) + 1)]


def full_label(heads: ExitHeads) -> str:
    """Return the second folder of what the full network logs."""
    return f"exit{len(heads) + 1}"


def backbone(network: nn.Module) -> nn.Module:
    """Return a network without what torch.compile wraps around it."""
    found: nn.Module = getattr(network, "_orig_mod", network)
    return found
