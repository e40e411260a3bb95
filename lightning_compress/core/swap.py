"""The optimizer sees w, the forward pass sees project(w).

    forward, backward        open()            optimizer.step()       close()
    module holds project(w)  module holds w    w changes              module holds project(w) again

The module holds project(w) at every moment but between `open` and `close`, which belong directly around the optimizer's
step: whoever looks (validation, a checkpoint, another callback, the next micro-batch) sees the projected weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Projector = Callable[[Mapping[str, Tensor]], None]


class Projection:
    """Holds parameters at project(w), in place, around optimizer steps.

    Args:
        parameters: The parameters, by name. Their identity never changes.
        project: Projects the tensors it is given, by name, in place. Called with any subset of the names.
        keep_latent: Whether the values from before the projection are kept and given back to the optimizer. Without it
            the optimizer goes on from project(w), which is all that a fixed mask needs.

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
        self._open: dict[str, nn.Parameter] = {}
        self._shares: dict[int, tuple[int, dict[str, nn.Parameter]]] = {}
        if keep_latent:
            self.latent = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def project(self) -> None:
        """Project every parameter anew, from its latent value where there is one: after the projection has changed."""
        self._rewrite(self.parameters)

    def open(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the latent values back, of all parameters or of those that `optimizer` steps."""
        if not self.keep_latent:
            return
        self.settle()
        self._open = self.share(optimizer)
        self._restore(self._open)

    @torch.no_grad()
    def close(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep the stepped values as the latent ones and project, after the step.

        Raises:
            RuntimeError: Latent values are kept, and the step was not announced by `open`.
        """
        share = self.share(optimizer)
        if self.keep_latent:
            if share and self._open != share:
                raise RuntimeError(
                    "An optimizer stepped without on_before_optimizer_step, so it started from projected weights. Step "
                    "it through Lightning: `self.optimizers()` with its default use_pl_optimizer=True."
                )
            self._open = {}
            for name, parameter in share.items():
                self._keep(name, parameter)
        self._project(share)

    def _keep(self, name: str, parameter: nn.Parameter) -> None:
        """Take the stepped value as the latent one; a subclass may change both, to the same."""
        self.latent[name].copy_(parameter)

    def settle(self) -> None:
        """Project what `open` left open because the step never came, as when a gradient scaler skips it."""
        if self._open:
            opened, self._open = self._open, {}
            self._rewrite(opened)

    def load_latent(self, latent: Mapping[str, Tensor]) -> None:
        """Take latent values from a checkpoint; the caller projects afterwards."""
        for name, value in latent.items():
            self.latent[name].copy_(value)

    @torch.no_grad()
    def _restore(self, share: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in share.items():
            parameter.copy_(self.latent[name])

    @torch.no_grad()
    def _rewrite(self, share: Mapping[str, nn.Parameter]) -> None:
        if self.keep_latent:
            self._restore(share)
        self._project(share)

    def share(self, optimizer: torch.optim.Optimizer | None) -> dict[str, nn.Parameter]:
        """Return the parameters that `optimizer` steps; without one, all."""
        if optimizer is None:
            return self.parameters
        count = sum(len(group["params"]) for group in optimizer.param_groups)  # groups may be added during a fit
        seen, share = self._shares.get(id(optimizer), (-1, {}))
        if seen != count:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            share = {name: parameter for name, parameter in self.parameters.items() if id(parameter) in stepped}
            self._shares[id(optimizer)] = count, share
        return share
