"""Weights that hold quantized values in the module, while the optimizer trains their latent real values.

forward, backward         open()             optimizer.step()    close()
module holds W~(w)        module holds w,    w changes           w is kept, module holds W~(w)
gradient dL/dW~           gradient dL/dw
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_compress.core.by_channel import transposed_groups
from lightning_compress.core.masking import keep_
from lightning_compress.core.projection import Projection
from lightning_compress.core.tensors import Kept


class LatentWeights(Projection):
    """Parameters that hold W~(w) between steps, while their real values w train.

    Weights that are exactly zero at construction, or that other code sets to zero later, count as pruned and stay zero.
    A subclass supplies `value`, and overrides the other methods of the first section where it needs them.

    Args:
        model: The network that holds the parameters.
        names: The parameters, by qualified name.

    Attributes:
        latent: The real values, by name; zero where a weight is pruned.
        alive: For each parameter with pruned weights, a mask that is False at these.

    Raises:
        ValueError: A weight is NaN or infinite.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        super().__init__({name: parameters[name] for name in names}, self._replace, keep_latent=True)
        self.alive: dict[str, Tensor] = {}
        self._groups = transposed_groups(model)
        self.check_finite()
        for name, latent in self.latent.items():
            self.zero_latent(name, latent == 0)
            self._begin(name)
            self._renew(name)
        if zero := [name for name, latent in self.latent.items() if not latent.any()]:
            warnings.warn(
                f"{', '.join(zero)}: every entry is zero, which counts as pruned, so that none of them trains.",
                stacklevel=2,
            )
        self.rewrite()

    # ------------------------------------------------------------------ what a subclass supplies

    def value(self, name: str, real: Tensor) -> Tensor:
        """Return the quantized values W~ of real values, in a new tensor."""
        raise NotImplementedError(f"{type(self).__name__} must supply value().")

    def shown_value(self, name: str, real: Tensor) -> Tensor:
        """Return the values to validate and save, for the real values of a parameter or of an average of it."""
        return self.value(name, real)

    def real_gradient(self, name: str, gradient: Tensor) -> None:
        """Turn the gradient with respect to W~ into the gradient with respect to w, in place."""
        if name in self.alive:
            keep_(gradient, self.alive[name])

    def _begin(self, name: str) -> None:
        """Replace the real values of a parameter, which are a copy of it, before the first projection."""

    def agree(self, held: Tensor, expected: Tensor) -> bool:
        """Whether a parameter still holds the values that `project` wrote."""
        return torch.equal(held, expected)

    def _forget(self, name: str) -> None:
        """Discard everything derived from the earlier real values of a parameter, which other code has replaced."""

    def _rewritten(self, name: str, changed: Tensor, held: Tensor, expected: Tensor) -> Tensor:
        """Return the entries that other code has written, out of those that differ from expected ones (`changed`)."""
        return changed

    @property
    def is_shown(self) -> bool:
        """Whether the module holds the values to validate and save, and these differ from those that train."""
        return False

    def _show_samples(self, shown: bool) -> None:
        """Make `value` return the random samples that train, or else the values to validate and save."""

    def _take_step(self, name: str, stepped: Tensor) -> None:
        """Store the real values after an optimizer step."""
        self.latent[name].copy_(stepped)

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        """Return the other tensors of the parameters' shapes that `state_dict` saves, by kind and name."""
        return {}

    # ------------------------------------------------------------------ around the optimizer's step

    def open(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Restore the real values, and turn the gradients with respect to W~ into those with respect to w."""
        super().open(optimizer)
        for name, parameter in self._open.items():
            if parameter.grad is not None:
                self.real_gradient(name, parameter.grad)

    def _keep(self, name: str, parameter: nn.Parameter) -> None:
        self._take_step(name, parameter)
        if name in self.alive:
            self.latent[name].masked_fill_(~self.alive[name], 0.0)
        parameter.copy_(self.latent[name])
        self._renew(name)

    def _take(self, name: str, held: Tensor, expected: Tensor, changed: Tensor) -> None:
        """Store the values that other code has written as real ones; if all of them are zero, count them as pruned."""
        changed = self._rewritten(name, changed, held, expected)
        if name in self.alive:
            changed = changed & self.alive[name]
        if not bool((changed & (held != 0)).any()):
            self.zero_latent(name, changed)
            return
        super()._take(name, held, expected, changed)
        self._forget(name)
        self._renew(name)

    # ------------------------------------------------------------------ what the module holds

    def project(self) -> None:
        """Write W~ into the module."""
        self.settle()
        self.take_writes()
        self._show_samples(True)
        self.rewrite()

    def show(self) -> None:
        """Write the values that are validated and saved into the module, until `project` or the next step."""
        self.settle()
        self.take_writes()
        self._show_samples(False)
        self.rewrite()

    def projected(self) -> dict[str, Tensor]:
        return self.shown()

    def expected(self, name: str) -> Tensor:
        return self.value(name, self.latent[name])

    def shown(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the values to validate and save, for the real values or for other tensors with these names."""
        given = self.latent | self._before if tensors is None else tensors
        return {name: self.shown_value(name, value.detach()) for name, value in given.items() if name in self.latent}

    @torch.no_grad()
    def take_real(self) -> None:
        """Store the values that the module holds, such as an average, as the real values, and project them."""
        for name, parameter in self.parameters.items():
            self.latent[name].copy_(parameter)
            if name in self.alive:
                self.latent[name].masked_fill_(~self.alive[name], 0.0)
            self._forget(name)
            self._renew(name)
        self.rewrite()

    @contextmanager
    def real(self) -> Iterator[None]:
        """Temporarily restore the real values in the module."""
        self.settle()
        self.take_writes()
        self._restore(self.parameters)
        try:
            yield
        finally:
            self.rewrite()

    def holds(self) -> bool:
        """Whether the module holds W~ of the current real values."""
        return all(
            self.agree(parameter.detach(), self.expected(name).to(parameter.device))
            for name, parameter in self.parameters.items()
        )

    @torch.no_grad()
    def zero_latent(self, name: str, gone: Tensor) -> None:
        """Zero latent values for good where `gone` is True; the caller projects afterwards."""
        if bool(gone.any()):
            self.alive[name] = ~gone if name not in self.alive else self.alive[name] & ~gone
            self.latent[name].masked_fill_(gone, 0.0)

    def check_finite(self) -> None:
        """Raise a ValueError where a real value is NaN or infinite, which rounding would hide."""
        for name, latent in self.latent.items():
            if not bool(latent.isfinite().all()):
                count = latent.numel() - int(latent.isfinite().sum())
                raise ValueError(
                    f"NaN or infinite: {count} of {latent.numel()} real values of {name}. Look for a diverged loss or "
                    f"gradient, or use a smaller learning rate."
                )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors that a resume needs."""
        return {"latent": self.latent | self._before, "alive": self.alive, **self._tables()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load a `state_dict`, and write its values into the module."""
        own = {"latent": self.latent, "alive": self.alive, **self._tables()}
        for kind, tensors in own.items():
            # Copies, because the state may belong to a callback whose tensors must not change.
            loaded = {name: one.detach().clone().to(self.parameters[name].device) for name, one in state[kind].items()}
            tensors.clear()
            tensors.update(loaded)
        self._open, self._before = {}, {}
        self.rewrite()

    def follow_device(self) -> None:
        for tensors in (self.latent, self.alive, *self._tables().values()):
            tensors |= {name: one.to(self.parameters[name].device) for name, one in tensors.items()}

    def follow_cut(self, model: nn.Module, kept: Kept) -> None:
        """Slice the tensors that belong to sliced parameters; `kept` has the positions that stayed."""
        self._slice(model, kept)
        self.rewrite()

    def _slice(self, model: nn.Module, kept: Kept) -> None:
        for tensors in (self.latent, self.alive, *self._tables().values()):
            for name in tensors.keys() & kept.keys():
                for dim, positions in kept[name].items():
                    tensors[name] = tensors[name].index_select(dim, positions.to(tensors[name].device))
        self._groups = transposed_groups(model)

    def _replace(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(self.value(name, tensor))

    def _alive(self, name: str, like: Tensor) -> Tensor | None:
        """Return the mask of a parameter's unpruned entries, on another tensor's device; None if no entry is pruned."""
        return self.alive[name].to(like.device) if name in self.alive else None
