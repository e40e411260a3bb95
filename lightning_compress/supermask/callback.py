"""Supermasks as a callback: random weights never train, and only the choice of those that remain is learned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_compress.core.distributed import from_first
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.core.input_hooks import InputHooks
from lightning_compress.core.numbers_by_pattern import numbers_by_name
from lightning_compress.core.select import matched_parameters, refuse_sparse_gradients
from lightning_compress.supermask.initial import Rescale, Start, check_start, start_from
from lightning_compress.supermask.masks import Method, check_method
from lightning_compress.supermask.record import note_origins
from lightning_compress.supermask.weights import SupermaskWeights
from lightning_compress.trainer.compatibility import added_parameters
from lightning_compress.trainer.latent import LatentCallback
from lightning_compress.trainer.settings import settings_of
from lightning_compress.trainer.unwrap import innermost


class SupermaskCallback(LatentCallback):
    """Learns which weights of a random network remain; no weight is trained.

    The optimizer gets a score for each weight instead of the weight, and the module holds the masked weights w m(s) at
    all times. The gradient of a score is dL/d(w m) w, straight through the mask.

    "edge_popup": the weights with the largest |score| of each layer remain. "signed": likewise, and where the score is
    negative the weight is inverted. "bernoulli": each weight remains with the probability sigmoid(30 score), in a
    sample drawn anew at every step, the same on all ranks; validation, checkpoints and the end of the fit have one
    sample, made of random numbers that are drawn once, so that it changes only with the scores. Once an epoch the
    callback logs `compress/left`, the fraction of the weights that remains, and of "signed" `compress/inverted`.

    The learning rates of weights serve scores too: 0.003 to 0.01 with Adam, 0.1 with SGD and momentum 0.9. The weight
    decay of the optimizer acts on scores: it makes later changes of a mask easier, and pulls probabilities to one half.

    Args:
        amount: The fraction of each layer's weights to remove, or `{pattern: fraction}`, of which the first pattern
            that matches a layer counts. With "bernoulli" training begins with it, and ends with another. 0 leaves a
            layer unchanged, so that its weights train; the same holds for layers that no pattern matches.
        method: "edge_popup", "bernoulli" or "signed".
        init: The weights to choose from. "as_is": the network's own, random or trained. "signed_constant": -c and +c
            with c = sqrt(2 / fan_in). "uniform": -a to a with a = sqrt(6 / fan_in). The latter two come from a seed, so
            that a compressed file has a mask and no weights.
        seed: The seed of these weights; None: rank 0's `torch.initial_seed()`.
        rescale: "fan" divides the weights by the root of the fraction that remains at `amount`. "dynamic" multiplies
            them by (entries / remaining entries) at every step. "none" does neither.
        others: "frozen" keeps all other parameters, such as biases and norms, at their initial values, except what
            `exclude` names. "trained" trains them.
        target: Patterns of modules (their `weight`) or parameters; by default the linear layers and convolutions that
            an optimizer trains when the fit begins and that the code of `forward` reaches.
        exclude: Patterns of what is trained as usual; a module that matches trains with its bias.

    Raises:
        ValueError: An argument is out of range.

    References:
        Zhou et al. 2019, "Deconstructing Lottery Tickets", section 5; Ramanujan et al. 2020, "What's Hidden in a
        Randomly Weighted Neural Network?"; Koster et al. 2022, "Signing the Supermask".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> supermask = SupermaskCallback(0.96, method="signed", init="signed_constant", rescale="fan")
        >>> trainer = Trainer(callbacks=[supermask], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    verb, done = "mask", "masked"
    kind = "scores"
    needs_gradients = True

    def __init__(
        self,
        amount: float | Mapping[str, float] = 0.5,
        *,
        method: Method = "edge_popup",
        init: Start = "as_is",
        seed: int | None = None,
        rescale: Rescale = "none",
        others: Literal["frozen", "trained"] = "frozen",
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__(start_epoch=0.0, **settings_of(locals()))
        check_method(method)
        check_start(init, rescale)
        _check_amount(amount)
        if others not in ("frozen", "trained"):
            raise ValueError(f"others={others!r} is unknown; expected 'frozen' or 'trained'.")
        if seed is not None:
            whole_number(seed, "seed is a whole number from 0 to 2^64 - 1", least=0, most=2**64 - 1)
            if init == "as_is":
                raise ValueError(
                    f"seed={seed} is for new weights, and init='as_is' keeps those of the network: use "
                    f"init='signed_constant' or 'uniform', or leave it out."
                )
        self.amount = dict(amount) if isinstance(amount, Mapping) else amount
        self.method: Method = method
        self.init: Start = init
        self.seed = seed
        self.rescale: Rescale = rescale
        self.others = others

        self._seed: int | None = None  # of this fit's weights
        self._frozen: Collection[str] = ()

    # ------------------------------------------------------------------ what has been reached

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The present int8 masks by parameter name: 1 remains, -1 remains inverted, 0 is removed."""
        return self._weights.masks if isinstance(self._weights, SupermaskWeights) else {}

    def numbers(self) -> dict[str, Callable[[], float]]:
        mine = self._weights
        if not isinstance(mine, SupermaskWeights):
            return {}
        return {"left": mine.left} | ({"inverted": mine.inverted} if self.method == "signed" else {})

    # ------------------------------------------------------------------ the fit

    def wants(self, pl_module: LightningModule) -> dict[str, float]:
        return numbers_by_name(
            pl_module,
            self.amount,
            target=self.target,
            default=self.patterns(pl_module, named=isinstance(self.amount, Mapping)),
            exclude=self.exclude,
            argument="amount",
            done="masked",
            leaving="0",
        )

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self._wanted = self.wants(pl_module)
        refuse_sparse_gradients(pl_module, self._wanted, self.name)
        self._frozen = self._to_freeze(trainer, pl_module) if self._wanted and self.others == "frozen" else ()
        self._check_weight_decay(trainer, pl_module)
        seed, generator = from_first((self.seed, torch.initial_seed() % 2**63))
        if state is not None:
            self._seed = state["seed"]
        elif self._seed is None:
            self._seed = generator if seed is None else seed
        self.generator.manual_seed(generator)  # the same on all ranks, so that all draw the same samples
        super().prepare(trainer, pl_module, state)
        if state is not None:
            self.generator.set_state(state["generator"].cpu())

    def make_weights(self, pl_module: LightningModule) -> SupermaskWeights:
        assert isinstance(self._wanted, dict)
        assert self._seed is not None
        origins = start_from(pl_module, self._wanted, self.init, seed=self._seed, rescale=self.rescale)
        note_origins(pl_module, origins)
        return SupermaskWeights(
            pl_module,
            self._wanted,
            method=self.method,
            per_kept=self.rescale == "dynamic",
            frozen=self._frozen,
            generator=self.generator,
        )

    def hook_inputs(self, pl_module: LightningModule) -> InputHooks | None:
        return None

    def shows_what_trains(self) -> bool:
        return self.method != "bernoulli"

    def technique_state(self) -> dict[str, Any]:
        return super().technique_state() | {"seed": self._seed, "generator": self.generator.get_state()}

    def _to_freeze(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Return the names of the parameters that neither this nor another technique trains, nor `exclude` names."""
        kept = {*self._wanted, *matched_parameters(pl_module, self.exclude)}
        kept |= added_parameters(trainer, pl_module, self)
        return [name for name, _ in innermost(pl_module).named_parameters() if name not in kept]

    def _check_weight_decay(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a ValueError for weight decay of parameters none of which ever moves."""
        frozen = {id(pl_module.get_parameter(name)): name for name in self._frozen}
        for optimizer in trainer.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                names = [frozen.get(id(one)) for one in group["params"]]
                if group.get("weight_decay") and names and all(names):
                    raise ValueError(
                        f"weight_decay={group['weight_decay']} of group {number} of {type(optimizer).__name__} moves "
                        f"nothing: {self.name}(others='frozen') keeps all its parameters, such as {names[0]}, at their "
                        f"initial values. Use weight_decay=0 for this group, or others='trained'."
                    )


def _check_amount(amount: Any) -> None:
    for pattern, one in (amount if isinstance(amount, Mapping) else {None: amount}).items():
        name = "amount" if pattern is None else f"amount[{pattern!r}]"
        real_number(one, f"{name} is the fraction to remove, from 0 to below 1", least=0, below=1)
    if isinstance(amount, Mapping) and not amount:
        raise ValueError("amount={} names no layer. Give {pattern: fraction}, or 0 to change nothing.")
