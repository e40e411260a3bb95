"""Base class of the callbacks that replace layers by other modules before the optimizers are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_compress.core.change_class import absent_parameters
from lightning_compress.core.distributed import from_first, on_all_ranks, rank, world_size
from lightning_compress.core.example_inputs import ExampleInputs, to_type
from lightning_compress.core.structure import follow
from lightning_compress.replacement.plan import Plan, carry_out, grouped, parameters_left
from lightning_compress.replacement.record import follow_layers, follow_replaced, kind_of
from lightning_compress.replacement.swap import replaced
from lightning_compress.trainer import rng
from lightning_compress.trainer.averages import averaged_modules, copies_inside
from lightning_compress.trainer.before_optimizers import before_optimizers, is_resumed
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.compatibility import check_early
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import inputs_of_batches, inputs_on_device, resolve_network
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.peek import first_batches
from lightning_compress.trainer.surgery import keep_metadata
from lightning_compress.trainer.unwrap import innermost, raw_optimizer


class ReplacingCallback(CompressionCallback):
    """A technique that replaces layers by other modules, once, before the first step of a module's first fit.

    A subclass sets `kind`, supplies `plan`, and `finish` where something follows, and has these attributes of its
    constructor. A resumed fit computes nothing: the load rebuilds the layers from the checkpoint's records.

    Attributes:
        kind: Of the records: "low_rank" or "conv_block".
        network: Dotted path of the submodule whose layers are replaced; empty: the module itself.
        example_inputs: What the network is called with; None: the module's `example_input_array`, or a peeked batch.
        n_batches: How many training batches `plan` gets, on all ranks together; 0: none.
    """

    kind: ClassVar[str]
    replaces_early = True
    network: str
    example_inputs: Any
    n_batches: int

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._plan: Plan | None = None  # of this fit, until it begins to train
        self._undo: list[Callable[[], None]] = []  # likewise
        self._gone: dict[str, nn.Parameter] = {}  # likewise: weights that have left, by the layer's path
        self._earlier: list[
            str
        ] = []  # layers that were replaced before this fit, also by another callback of this kind
        self._left = 1.0  # the share of the parameters

    # ------------------------------------------------------------------ what a technique supplies

    def plan(self, network: nn.Module, example_inputs: ExampleInputs, batches: Sequence[ExampleInputs]) -> Plan:
        """Return what replaces which layers; nothing changes.

        All ranks call this, each with its own batches, and the plan of rank 0 is carried out.

        Raises:
            ValueError: Nothing can be replaced, or a budget can't be met.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply plan().")

    def finish(self, network: nn.Module, batches: Sequence[ExampleInputs]) -> None:
        """Act when the layers are replaced, as to recalibrate norms; all ranks call this, each with its batches."""

    # ------------------------------------------------------------------ before the optimizers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        follow(pl_module)  # the module gets the layers of loaded checkpoints
        if stage == "fit":
            self._forget()
            before_optimizers(
                trainer,
                self,
                before=lambda: self._follow(trainer, pl_module),
                after=lambda: self._replace(trainer, pl_module),
            )

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._earlier = self._mine(pl_module)
        for average in averaged_modules(trainer):
            follow_replaced(average, pl_module)

    def _replace(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_resumed(trainer):
            if self.loaded_state is None or sorted(self.loaded_state["layers"]) != sorted(self._mine(pl_module)):
                raise ValueError(
                    f"The checkpoint {trainer.ckpt_path} is of a fit without {self.name}, or has lost the records of "
                    f"its layers: nothing is replaced in a resumed fit. Load its weights into the module, and start a "
                    f"new fit without ckpt_path."
                )
            self._left = float(self.loaded_state["left"])
            return
        if self._earlier:
            rank_zero_info(
                f"{self.name}: {len(self._earlier)} layers of {type(innermost(pl_module)).__name__} are replaced "
                f"already, such as {self._earlier[0]}; the fit goes on with them, and replaces no others."
            )
            return
        nothing = [name for name in ("max_epochs", "max_steps", "limit_train_batches") if getattr(trainer, name) == 0]
        if nothing:
            rank_zero_info(f"{self.name} replaces nothing, because {nothing[0]}=0: this fit trains nothing.")
            return
        check_early(trainer, pl_module)
        states = rng.capture()
        try:
            self._replace_now(trainer, pl_module)
        finally:
            rng.restore(states)

    def _replace_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model_to_device()
        network = resolve_network(pl_module, self.network)
        inputs = on_all_ranks(lambda: inputs_on_device(pl_module, network, self.example_inputs))
        batches = on_all_ranks(lambda: self._batches(trainer, network)) if self.n_batches else []
        plan = from_first(on_all_ranks(lambda: self.plan(network, inputs, batches)))
        layers = {path: network.get_submodule(path) for path in plan.replacements}
        weights = {path: layer._parameters["weight"] for path, layer in layers.items()}
        self._plan, self._gone = plan, {path: one for path, one in weights.items() if one is not None}
        own = innermost(pl_module)
        copies = [*averaged_modules(trainer), *copies_inside(own)]  # found by their shapes
        self._undo.append(carry_out(network, plan, self.kind))
        self.finish(network, batches)
        for copy in copies:
            self._undo.append(follow_layers(copy, own, values=True))
        self._left = parameters_left(network)
        kept = f"As they were: {'; '.join(grouped(plan.kept))}." if plan.kept else ""
        rank_zero_info(
            f"{self.name}: replaced {len(plan.replacements)} layers, {', '.join(plan.replacements) or 'none'}. "
            f"{self._left:.1%} of the parameters are left. {kept}".strip()
        )

    def _batches(self, trainer: Trainer, network: nn.Module) -> list[ExampleInputs]:
        """Return this rank's share of the first training batches, as the network takes them."""
        like = next(network.parameters())

        def move(inputs: Any) -> Any:
            return to_type(trainer.strategy.batch_to_device(inputs), like.dtype)

        try:
            batches = first_batches(trainer, self.n_batches)
        except ValueError as error:
            raise ValueError(
                f"{error} {self.name} reads {self.n_batches} batches: let it read none instead."
            ) from error
        if not batches:
            raise ValueError(f"{self.name}: the training loader yields no batch.")
        try:
            return inputs_of_batches(batches, network, move)[rank() :: world_size()]
        except ValueError as error:
            if not self.network:
                raise
            raise ValueError(
                f"{self.name} calls network={self.network!r} with training batches, also where example_inputs= are "
                f"given: choose layers by target= instead of network=. {error}"
            ) from error

    def _layers(self) -> list[str]:
        """Return the paths of the replaced layers of the module that was fitted last."""
        fitted = None if self._fitted is None else self._fitted()
        return [] if fitted is None else self._mine(fitted)

    def _mine(self, pl_module: LightningModule) -> list[str]:
        """Return the paths of the layers that are replaced by this kind of technique."""
        found = replaced(resolve_network(pl_module, self.network))
        return [path for path, layer in found.items() if kind_of(layer) == self.kind]

    # ------------------------------------------------------------------ the fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        absent = {
            id(one): f"{path}.{name}"
            for path, layer in replaced(pl_module).items()
            for name, one in absent_parameters(layer).items()
        }
        for optimizer in map(raw_optimizer, trainer.optimizers):
            trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
            for path, weight in self._gone.items():
                if id(weight) in trained:
                    raise ValueError(
                        f"{type(optimizer).__name__} was made before {self.name} replaced {path!r}, and would train a "
                        f"weight that has left the network: make it in configure_optimizers."
                    )
            if names := [name for one, name in absent.items() if one in trained]:
                raise ValueError(
                    f"{type(optimizer).__name__} was made for {names[0]}, which has left the network: "
                    f"{names[0].rpartition('.')[0]} is replaced and has other parameters. Let configure_optimizers "
                    f"take the parameters() of layers, or exclude this one."
                )

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        pass

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().before_first_step(trainer, pl_module)
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        for undo in self._undo:  # the fit was refused before its first step
            undo()
        self._forget()

    def _forget(self) -> None:
        self._undo, self._gone, self._plan = [], {}, None

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        return Effects(replaces_layers=True)

    def progress(self) -> Progress:
        return Progress(fraction=float(bool(self._layers())), numbers={"parameters_left": lambda: self._left})

    def outline(self, pl_module: LightningModule, inputs: Callable[[], ExampleInputs]) -> Outline | None:
        given = inputs() if self.example_inputs is None else self.example_inputs
        network = resolve_network(pl_module, self.network)
        plan = self.plan(network, given, [given] if self.n_batches else [])
        return Outline(
            ["layer", "becomes", "with", "parameters", "then"],
            plan.rows(network),
            "A fit decides by its training batches; this table saw the example inputs alone." if self.n_batches else "",
        )

    # ------------------------------------------------------------------ checkpoints

    def project_copy(self, module: nn.Module) -> None:
        """Averages hold the values of the weights as they are."""

    def technique_state(self) -> dict[str, Any]:
        return {"layers": self._layers(), "left": self._left}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        keep_metadata(checkpoint, pl_module)
