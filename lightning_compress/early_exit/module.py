"""Early exits as a wrapper: any LightningModule whose network also answers from inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.core.answering import answering, copied_alone, way_now
from lightning_compress.core.distributed import gather
from lightning_compress.core.example_inputs import ExampleInputs, to_device
from lightning_compress.early_exit.calibration import Outcome, Table, calibrate, evaluate
from lightning_compress.early_exit.collect import collect, trained_on
from lightning_compress.early_exit.costs import costs_of
from lightning_compress.early_exit.heads import check_finite, heads_of, layer_of
from lightning_compress.early_exit.making import named
from lightning_compress.early_exit.network import EarlyExitNetwork
from lightning_compress.early_exit.objective import EarlyExits, Training
from lightning_compress.early_exit.one_step import Gradient
from lightning_compress.early_exit.record import note_heads, take_heads
from lightning_compress.early_exit.rules import Confidence, ExitRule, Rule, Unit
from lightning_compress.early_exit.static import Served
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.loss_weights import Weights
from lightning_compress.trainer.one_step import backbone
from lightning_compress.trainer.operating_points import OperatingPoint
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.replay import with_output
from lightning_compress.trainer.unwrap import objective_of, without_trainer
from lightning_compress.trainer.wrapper import CompressionModule, check_wrappable

_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)  # of the full network's cost, for reports


class EarlyExitHeads(CompressionModule):
    """Give a network exits: heads on layers inside it, trained with it, at which easy samples can leave.

    With e_k the module's own loss when its network returns the logits of exit k, and e_{K+1} its loss as it is:

        loss = w_1 e_1 + ... + w_K e_K + w_{K+1} e_{K+1}

    The module's `training_step` runs as it is; then it is run again for each exit, with that exit's logits in the place
    of the network's output, from the same random states, with metrics of its own, and without running the network.
    What it logs as "val_acc" is logged as "exit1/val_acc" and so on, for the full network as "val_acc" too.
    Validation and test report all exits likewise.

    The heads become a part of the network, as its child `exit_heads`: they are saved with it in checkpoints and
    compressed files, and are cut with the layers that they read. The keys of the module's own tensors stay.

    Args:
        module: The LightningModule.
        exits: Names of layers within the network; or a number of exits, placed at equal shares of its MACs; or such
            shares, as [0.25, 0.5, 0.75]. None: the exits that the network has already, as from a compressed file.
        num_classes: How many logits the network returns.
        head: "auto": by the layer's output, a "map", "tokens" or a "vector", which may also be said here; a function of
            features and num_classes that returns a module; or a sequence of modules.
        weights: w, one for each exit and one for the full network, numbers or schedules as in `DistillationModule`;
            "equal": all 1; "rising": that of exit k of K rises to k / (K + 1), from 0.01. None: "rising", and "equal"
            with train="frozen" or another gradient than "full".
        train: "joint", all of the network; "frozen", the heads alone, on the network as it is in evaluation.
        distill: The share a of the full network's outputs f in the loss of exit k, with logits z:
            (1 - a) e_k + a T^2 KL(softmax(f / T) || softmax(z / T)).
        temperature: T.
        gradient: What exits do to the network before them: "full"; "equilibrium", each of the L classifiers gets 1 / L
            of the gradient at every layer; "stop", nothing.
        network: Dotted path of the submodule whose output is the prediction; empty: the module's own forward.
        output: Key, position or attribute of the logits, where the network returns more than a tensor.
        example_inputs: What the network is called with, to find shapes; None: the module's `example_input_array`, or
            else one peeked batch when the fit begins, until which there are no heads, unless a checkpoint brings them.

    Raises:
        TypeError: `module` is no LightningModule.
        ValueError: A layer that does not exist, does not run or runs twice; one whose output no head reads; a number
            out of range; a network that computes its own loss.

    Paper:
        Teerapittayanon et al., BranchyNet (1709.01686); Kaya et al., Shallow-deep networks (1810.07052), section 3;
        Li et al. (1908.06294), section 3.1, for the equilibrium of gradients.

    Example:
        >>> import torch
        >>> from lightning_compress.baselines import Classifier, DigitsConvNet
        >>> module = Classifier(DigitsConvNet(width=8))
        >>> module = EarlyExitHeads(
        ...     module, ["pool1"], num_classes=10, network="network", example_inputs=torch.zeros(2, 1, 8, 8)
        ... )
        >>> [name for name in module.state_dict() if "exit_heads" in name]
        ['network.exit_heads.1.mix', 'network.exit_heads.1.linear.weight', 'network.exit_heads.1.linear.bias']
    """

    __slots__ = ()

    def __init__(
        self,
        module: LightningModule,
        exits: int | Sequence[str] | Sequence[float] | None = 3,
        *,
        num_classes: int,
        head: str | Callable[[Tensor, int], nn.Module] | Sequence[nn.Module] = "auto",
        weights: Weights | None = None,
        train: Training = "joint",
        distill: float = 0.0,
        temperature: float = 4.0,
        gradient: Gradient = "full",
        network: str = "",
        output: str | int | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        check_wrappable(module, type(self))
        objective = EarlyExits(
            exits,
            num_classes=num_classes,
            head=head,
            weights=weights,
            train=train,
            distill=distill,
            temperature=temperature,
            gradient=gradient,
            network=network,
            output=output,
            example_inputs=example_inputs,
        )
        found = resolve_network(module, network)
        given = example_inputs if example_inputs is not None else getattr(module, "example_input_array", None)
        if not objective.adopt(found):
            if exits is None:
                raise ValueError(f"exits=None, and {type(found).__name__} has no exits: name layers, or how many.")
            for layer in named(objective.exits):
                layer_of(backbone(found), layer)  # or say that there is none
            if given is not None:
                objective.build(found, given)
            elif exits:
                note_heads(backbone(found), named(objective.exits))
        super().__init__(module, objective)

    def calibrate(
        self,
        loader: Any,
        *,
        budget: float | None = None,
        unit: Unit | Literal["share"] = "macs",
        accuracy_drop: float | None = None,
        rule: Rule = "confidence",
        confidence: Confidence | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        right: Callable[[Tensor, Tensor], Tensor] | None = None,
        trainer: Trainer | None = None,
        **options: Any,
    ) -> Outcome:
        """Find the thresholds at which samples leave, and keep them with the heads.

        The module's own validation step runs over the loader, as in `trainer.validate`. Each exit gets a temperature,
        and the thresholds are the most accurate ones within a budget, or the cheapest ones within a drop: see
        `early_exit.calibration`.

        Args:
            loader: Of samples that the network was not trained on; or a LightningDataModule.
            budget: The largest mean cost per sample.
            unit: Of the budget: "macs"; "ms" per sample, measured now in batches of the loader's size; or "share" of
                the full network's MACs.
            accuracy_drop: How far the accuracy may be below the full network's: 0.003 is 0.3 points.
            rule: "confidence", "entropy", "margin" or "patience".
            confidence: For outputs that are no classification: a function from a head's output to a number per sample.
            targets: Picks the targets of a batch; by default its last part, or what it has under a name as "labels".
            right: With `confidence`: a function from an output and the targets to how good the output is for each
                sample, 0 to 1.
            trainer: Runs the validation; None: one on the module's device that reports nothing.
            options: Of `early_exit.calibration.calibrate`.

        Returns:
            What the rule does to these samples: accuracy, mean cost, shares by exit.

        Raises:
            ValueError: There are no heads yet, or one is no longer finite; neither or both of budget and drop; a budget
                below the first exit.
        """
        objective = self._objective()
        heads = objective.heads(self)
        if not heads:
            raise ValueError(
                "The exits have no heads yet, as no fit has begun: pass example_inputs=, or fit or load the module."
            )
        check_finite(heads)
        if (confidence is None) != (right is None):
            raise ValueError("confidence= needs right=, which says how good an output is, and the other way round.")
        if trained_on(self, loader):
            warnings.warn(
                "The loader has samples that the network was trained on, of which it is surer than of others: exits "
                "will open too early. Pass other samples.",
                stacklevel=2,
            )
        found = collect(self, objective, loader, targets=targets, trainer=trainer)
        assert found.inputs is not None
        early = self._deployed(found.inputs, rule=None, output=objective.output, confidence=confidence)
        costs = costs_of(early, found.inputs, "ms" if unit == "ms" else "macs")
        outputs, aims = found.outputs(), torch.cat(found.targets)
        if confidence is None or right is None:
            table = Table(stages=costs.stages, heads=costs.heads, logits=outputs, targets=aims)
        else:
            table = Table(
                stages=costs.stages,
                heads=costs.heads,
                scores=torch.stack([confidence(one) for one in outputs[:-1]]),
                right=torch.stack([right(one, aims) for one in outputs]),
            )
        given = budget * sum(costs.stages) if unit == "share" and budget is not None else budget
        chosen = calibrate(
            table,
            budget=given,
            accuracy_drop=accuracy_drop,
            rule=rule if confidence is None else "custom",
            unit="ms" if unit == "ms" else "macs",
            **options,
        )
        chosen = ExitRule.from_dict(gather(chosen.to_dict())[0])  # milliseconds differ from rank to rank
        self._rules()[self._way()] = chosen
        return evaluate(table, chosen)

    def deploy(self, *, example_inputs: ExampleInputs | None = None, **options: Any) -> EarlyExitNetwork:
        """Return the network as a plain module whose easy samples leave early: `forward(x) -> (output, exit_index)`.

        It is a copy in evaluation mode, with the thresholds of `calibrate`; `forward(x, exit=k)` needs none.

        Args:
            example_inputs: Some samples; None: those with which the heads were made.
            options: `min_gain`, `compile`, `whole_batch` and `confidence` of `EarlyExitNetwork`.

        Raises:
            ValueError: There are no heads yet, or no example inputs; a head is no longer finite.
        """
        objective = self._objective()
        heads = objective.heads(self)
        given = example_inputs if example_inputs is not None else objective.example_inputs
        given = self.example_input_array if given is None else given
        if not heads or given is None:
            raise ValueError(
                "deploy() needs heads and example inputs: fit or load the module first, and pass example_inputs=."
            )
        check_finite(heads)
        return self._deployed(given, rule=self._rules().get(self._way()), output=objective.output, **options)

    def operating_points(self) -> list[OperatingPoint]:
        """Return the points of each exit, of the thresholds, and of a few budgets of their frontier."""
        objective = self._objective()
        heads = objective.heads(self)
        if not heads or objective.example_inputs is None:
            return []
        early = self.deploy()
        points = [self._point(early, f"exit {k}", exit=k) for k in range(1, len(heads) + 1)]
        rule = self._rules().get(self._way())
        if rule is not None:
            full, known = sum(rule.stages), {rule.thresholds}
            for share in _BUDGETS:
                if rule.frontier and share * full >= rule.frontier[0][0]:
                    thresholds = rule.within(share * full).thresholds
                    if thresholds not in known:
                        points.append(self._point(early, f"{share:.0%} of {rule.unit}", budget=share * full))
                    known.add(thresholds)
            points.append(self._point(early, "calibrated"))
        return points

    def outline(self, inputs: ExampleInputs) -> Outline | None:
        objective = self._objective()
        network = resolve_network(self, objective.network)
        if not objective.heads(self):
            objective.build(network, inputs)
        early = self._deployed(inputs, rule=None, output=objective.output)
        costs = costs_of(early, inputs)
        full, rows = sum(costs.stages), []
        for k, (layer, head) in enumerate(zip(early.exits, early.heads, strict=True), start=1):
            parameters = sum(one.numel() for one in head.parameters())
            reached = f"{sum(costs.stages[:k]) / full:.1%}"
            rows.append([str(k), layer, reached, f"{costs.heads[k - 1] / full:.2%}", f"{parameters:,}"])
        note = f"Shares are of the full network's {full:,.0f} MACs per sample."
        if early.reason:
            note += f" Whole batches leave: {early.reason}"
        return Outline(["exit", "after", "MACs up to it", "MACs of its head", "parameters of its head"], rows, note)

    def _point(self, early: EarlyExitNetwork, name: str, **options: Any) -> OperatingPoint:
        """Return one way to run the network: at an exit, within a budget, or by the thresholds."""
        objective = self._objective()
        served = Served(early, **options).eval()
        network = resolve_network(self, objective.network)

        @contextmanager
        def serving() -> Iterator[None]:
            objective.serving = partial(answering, network, partial(self._served, served))
            try:
                yield
            finally:
                objective.serving = None

        return OperatingPoint(name, served, serving)

    def _served(self, served: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns, with the outputs of an operating point in it."""
        objective = self._objective()
        network: Any = resolve_network(self, objective.network)
        whole = type(network).forward(network, *args, **kwargs)  # for whatever it returns beside the logits
        return with_output(whole, objective.output, served(*args, **kwargs), "The network")

    def _objective(self) -> EarlyExits:
        return objective_of(self, EarlyExits)

    def _way(self) -> str:
        """Return the name of the way in which the network runs now, such as at a width that was set."""
        return way_now(backbone(resolve_network(self, self._objective().network)))

    def _rules(self) -> dict[str, ExitRule]:
        """Return the rules of all ways, which the heads of the full network keep."""
        heads = heads_of(backbone(resolve_network(self, self._objective().network)))
        return {} if heads is None else heads.rules

    def _deployed(self, inputs: ExampleInputs, *, rule: ExitRule | None, **options: Any) -> EarlyExitNetwork:
        objective = self._objective()
        with without_trainer(self):
            network = copied_alone(backbone(resolve_network(self, objective.network)))
        heads = heads_of(network)
        assert heads is not None
        take_heads(network)
        device = next((one.device for one in network.parameters()), torch.device("cpu"))
        moved = to_device(inputs, device)
        return EarlyExitNetwork(network.eval(), heads.eval().by_layer(), rule, moved, **options).eval()
