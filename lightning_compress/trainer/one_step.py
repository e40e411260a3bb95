"""One step of a module: the real step, in which the network runs as it is, and the replays with other outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_compress.core.answering import answering_now
from lightning_compress.core.outputs import select_output
from lightning_compress.trainer.capture import captured
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.replay import replaying
from lightning_compress.trainer.replica import Before, Replica
from lightning_compress.trainer.unwrap import SLOT


class OneStep:
    """A batch on its way through a module: the real step, and its replays.

    A subclass supplies `answer` and `logits_of`.

    Args:
        module: The wrapper.
        replicas: Of each replay, by the label of what it logs.
        batch: The step's arguments, positional and by name.
        network: Dotted path of the network.
        output: What picks the logits from its output.
        full_label: The second folder of what the real step logs.

    Attributes:
        inputs: What the network was called with.
        output: What it returned.
        called: Whether the step has called it.
        was_called: Raises an error if it has not.
    """

    def __init__(
        self,
        module: LightningModule,
        replicas: Mapping[str, Replica],
        batch: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        network: str,
        output: str | int | None,
        full_label: str,
    ) -> None:
        self.module, self.path, self.picks, self.full_label = module, network, output, full_label
        self.network = resolve_network(module, self.path)
        self.replicas = replicas
        self.before = Before(module, backbone(self.network), replicas.values(), batch)
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.output: Any = None
        self.called = False
        self.was_called: Callable[[], None] = lambda: None

    def watched(self) -> AbstractContextManager[None]:
        """Return what is around the real step, to see what happens inside the network."""
        return nullcontext()

    def answer(self, label: str) -> AbstractContextManager[None]:
        """Return a block in which calls of the network get the output of a replay."""
        raise NotImplementedError(f"{type(self).__name__} must supply answer().")

    def logits_of(self, label: str) -> Tensor:
        """Return the logits that the step got in a replay."""
        raise NotImplementedError(f"{type(self).__name__} must supply logits_of().")

    @property
    def logits(self) -> Tensor:
        """The full network's."""
        return select_output(self.output, self.picks, "The network")

    @contextmanager
    def real_step(self) -> Iterator[None]:
        """Catch the network's output while the block runs the user's step."""
        with ExitStack() as stack:
            stack.enter_context(also_logged(self.module, self.full_label))
            stack.enter_context(self.watched())
            self.was_called = stack.enter_context(captured(self.module, self.path, self._begin, self._end))
            yield
        self.before.check_batch()
        self.before.after_real_step()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before.check_batch()
        self.inputs = (args, kwargs)

    def _end(self, output: Any) -> None:
        self.before.look_at_batch()  # the network may write into its inputs
        self.output, self.called = output, True

    def replayed(self, label: str, run: Callable[..., Any]) -> Any:
        """Return what the user's step `run` returns in the replay with this label."""
        answered = self.answer(label)
        with replaying(self.module, label, self.replicas[label], self.before), answered:
            args, kwargs = self.before.batch()
            return run(*args, **kwargs)


@contextmanager
def also_logged(module: LightningModule, folder: str) -> Iterator[None]:
    """Log what the block logs in a folder as well."""
    inside: Any = getattr(module, SLOT)
    before = inside.folders
    inside.folders = (*before, *(f"{one}{folder}/" for one in before))
    try:
        yield
    finally:
        inside.folders = before


def backbone(network: nn.Module) -> nn.Module:
    """Return a network without what torch.compile wraps around it."""
    found: nn.Module = getattr(network, "_orig_mod", network)
    return found


def computing(network: nn.Module) -> nn.Module:
    """Return the module that computes when a network is called: without torch.compile, and at the width set."""
    return answering_now(backbone(answering_now(network)))
