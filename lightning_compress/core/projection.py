"""The optimizer sees w, the forward pass sees project(w).

    forward, backward        open()            optimizer.step()       close()
    module holds project(w)  module holds w    w changes              module holds project(w) again

The module holds project(w) at every moment but between `open` and `close`, which belong directly around the optimizer's
step. So validation, checkpoints, other callbacks and the next micro-batch see the projected weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Projector = Callable[[Mapping[str, Tensor]], None]


class Projection:
    """Holds parameters at project(w), in place, around optimizer steps.

    Values that other code writes into the module between steps are kept: where a parameter differs from the values that
    this object wrote last, its value becomes the latent one.

    Args:
        parameters: The parameters, by name. Their identity never changes.
        project: Projects the given tensors, by name, in place. It is called with any subset of the names.
        keep_latent: Whether to keep the values from before the projection for the optimizer. Otherwise the optimizer
            steps from project(w), which suffices for a fixed mask.

    Attributes:
        rewritten: Names of parameters that other code has written between steps.
        suspended: Whether the module temporarily holds other values, such as an average, which must not become latent.

    Example:
        >>> w = nn.Parameter(torch.tensor([0.3, -2.0]))
        >>> sign = Projection({"w": w}, lambda tensors: [t.sign_() for t in tensors.values()], keep_latent=True)
        >>> sign.project(); w.data
        tensor([ 1., -1.])
        >>> sign.open(); w.data
        tensor([ 0.3000, -2.0000])
        >>> w.data += 1.5; sign.close(); w.data, sign.latent["w"]
        (tensor([ 1., -1.]), tensor([ 1.8000, -0.5000]))
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], project: Projector, *, keep_latent: bool) -> None:
        self.parameters = dict(parameters)
        self._project = project
        self.keep_latent = keep_latent
        self.latent: dict[str, Tensor] = {}
        self.rewritten: set[str] = set()
        self._open: dict[str, nn.Parameter] = {}
        self._before: dict[str, Tensor] = {}  # latent values from before a step that evaluates the loss several times
        self._versions: dict[str, int] = {}  # of the parameters, after this object wrote them last
        self._latent_versions: dict[str, tuple[int, int]] = {}
        self._writing = False
        self.suspended = False
        if keep_latent:
            self.latent = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for name in self.parameters:
                self._note(name)

    # ------------------------------------------------------------------ around the optimizer's step

    def open(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Restore the latent values of all parameters, or of those that `optimizer` steps."""
        if not self.keep_latent:
            return
        if self._open:
            self.settle()
        share = self.share(optimizer)
        self.take_writes(share)
        with self._write(share):
            self._open = share
            self._restore(share)

    def interrupt(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Project within a step, before the optimizer evaluates the loss again; another `open` follows."""
        share = self._open if self.keep_latent else self.share(optimizer)
        with self._write(share):
            for name, parameter in self._open.items():
                self._before.setdefault(name, self.latent[name])
                self.latent[name] = parameter.detach().clone()
                self._renew(name)
            self._open = {}
            self._project(share)

    def close(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep the stepped values as the latent ones and project, after the step.

        Raises:
            RuntimeError: Latent values are kept, and the step was not announced by `open`.
        """
        share = self.share(optimizer)
        if not share:
            return
        if self.keep_latent and self._open.keys() != share.keys():
            raise RuntimeError(
                "An optimizer stepped without on_before_optimizer_step, so it started from projected weights. Step "
                "it through Lightning: `self.optimizers()` with its default use_pl_optimizer=True."
            )
        with self._write(share):
            self._open = {}
            self._put_before()
            for name, parameter in share.items() if self.keep_latent else ():
                self._keep(name, parameter)
            self._project(share)

    def settle(self) -> None:
        """Project the parameters that are still open because their step was skipped, as a gradient scaler does."""
        if self._open or self._before:
            share = self._open | {name: self.parameters[name] for name in self._before}
            with self._write(share):
                self._open = {}
                for name in self._put_before():
                    self._renew(name)
                self._restore(share)
                self._project(share)

    @property
    def settled(self) -> bool:
        """Whether the module holds project(w): no step and no write is under way."""
        return not (self._open or self._before or self._writing)

    def share(self, optimizer: torch.optim.Optimizer | None) -> dict[str, nn.Parameter]:
        """Return the parameters that the groups of `optimizer` hold now; without an optimizer, all parameters."""
        if optimizer is None:
            return self.parameters
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name: parameter for name, parameter in self.parameters.items() if id(parameter) in stepped}

    # ------------------------------------------------------------------ what the module holds

    def project(self) -> None:
        """Project every parameter again after the projection has changed, from its latent value where there is one."""
        self.take_writes()
        self.rewrite(self.parameters)

    def rewrite(self, share: Mapping[str, nn.Parameter] | None = None) -> None:
        """Write the projected latent values, whatever the module holds; without latent ones, project what it holds."""
        share = self.parameters if share is None else share
        with self._write(share):
            if self.keep_latent:
                self._restore(share)
            self._project(share)

    def refresh(self, *, by_value: bool = False) -> None:
        """Store the values that other code has written since the last projection, and project them.

        Args:
            by_value: Whether to compare values. By default the version counters of the parameters are compared, which
                costs almost nothing, but misses what was written through `.data`.
        """
        if self.suspended:
            return
        written = {
            name: parameter
            for name, parameter in self.parameters.items()
            if (by_value or parameter._version != self._versions.get(name)) and name not in self._open
        }
        if self.keep_latent:
            self.take_writes(written)
        elif written:
            self.rewrite(written)

    @torch.no_grad()
    def take_writes(self, share: Mapping[str, nn.Parameter] | None = None) -> None:
        """Store the values that other code has written into the module as latent ones, and project them."""
        if not self.keep_latent or self._writing or self.suspended:
            return
        written = {}
        for name, parameter in (self.parameters if share is None else share).items():
            if name in self._open:
                continue
            held = parameter.detach()
            if not self.differing({name: parameter}):
                self._note(name)
                continue
            written[name] = parameter
            if self._latent_versions.get(name) != _version(self.latent[name]):
                self._renew(name)  # other code wrote the latent values, which the module follows
                continue
            expected = self.expected(name)
            changed = ((held - expected).abs_() <= _rounding(expected)).logical_not_()
            if bool(changed.any()):
                self.rewritten.add(name)
                self._take(name, held, expected, changed)
        self.rewrite(written)

    @torch.no_grad()
    def differing(self, share: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of the parameters whose values other code has changed."""
        distances = {  # NaN is not 0
            name: float(torch.linalg.vector_norm(self.expected(name).sub_(parameter.detach())))
            for name, parameter in share.items()
            if name not in self._open
        }
        return [name for name, distance in distances.items() if distance != 0.0]

    @torch.no_grad()
    def projected(self) -> dict[str, Tensor]:
        """Return the projected values in new tensors; during an optimizer step, those from before it."""
        latent = self.latent | self._before
        values = {name: latent.get(name, p.detach()).clone() for name, p in self.parameters.items()}
        self._project(values)
        return values

    def expected(self, name: str) -> Tensor:
        """Return the values that a parameter has unless other code has written it."""
        tensor = self.latent[name].clone()
        self._project({name: tensor})
        return tensor

    def _take(self, name: str, held: Tensor, expected: Tensor, changed: Tensor) -> None:
        """Store the values that other code has written into a parameter as its latent ones, where `changed`."""
        torch.where(changed, held, self.latent[name], out=self.latent[name])

    def follow_device(self) -> None:
        """Move latent values to the device of their parameter: the Trainer moves the network to the CPU after a fit."""
        self.latent |= {name: latent.to(self.parameters[name].device) for name, latent in self.latent.items()}

    def load_latent(self, latent: Mapping[str, Tensor]) -> None:
        """Load latent values from a checkpoint; the caller projects afterwards."""
        for name, value in latent.items():
            self.latent[name].copy_(value)

    # ------------------------------------------------------------------ how tensors are written

    def _keep(self, name: str, parameter: nn.Parameter) -> None:
        """Store the stepped value as the latent one; a subclass may change both, to the same value."""
        self.latent[name].copy_(parameter)

    def _renew(self, name: str) -> None:
        """Update what a subclass derives from the latent values of a parameter, after they have changed."""

    def _put_before(self) -> list[str]:
        before, self._before = self._before, {}
        self.latent.update(before)
        return list(before)

    @contextmanager
    def _write(self, share: Mapping[str, nn.Parameter]) -> Iterator[None]:
        self._writing = True
        try:
            with torch.no_grad():
                yield
            for name in share:
                self._note(name)
        finally:
            self._writing = False

    def _note(self, name: str) -> None:
        self._versions[name] = self.parameters[name]._version
        if self.keep_latent:
            self._latent_versions[name] = _version(self.latent[name])

    @torch.no_grad()
    def _restore(self, share: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in share.items():
            parameter.copy_(self.latent[name])


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _rounding(expected: Tensor) -> Tensor:
    """Return the rounding error of entries that were moved away and back, as by sharpness-aware minimization."""
    eps = torch.finfo(expected.dtype).eps
    return expected.abs().mul_(eps).add_(expected.abs().amax(), alpha=4 * min(eps, 1e-7))
