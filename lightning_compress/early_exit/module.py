"""Early exits as a wrapper: any LightningModule whose network also answers from inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.early_exit.objective import EarlyExits, Gradient, Training, check_layers
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.wrapper import CompressionModule, check_wrappable


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
            "equal": all 1; "rising": that of exit k of K rises to k / (K + 1), from 0.01.
        train: "joint", all of the network; "frozen", the heads alone, on the network as it is in evaluation.
        distill: The share a of the full network's outputs f in the loss of exit k, with logits z:
            (1 - a) e_k + a T^2 KL(softmax(f / T) || softmax(z / T)).
        temperature: T.
        gradient: What exits do to the network before them: "full"; "equilibrium", each of the L classifiers gets 1 / L
            of the gradient at every layer; "stop", nothing.
        network: Dotted path of the submodule whose output is the prediction; empty: the module's own forward.
        output: Key, position or attribute of the logits, where the network returns more than a tensor.
        example_inputs: What the network is called with, to find shapes; None: the module's `example_input_array`, or
            else one peeked batch when the fit begins, until which there are no heads.

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
        weights: str | Sequence[float | Mapping[str, Any]] = "equal",
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
            check_layers(found, exits)
            if given is not None:
                objective.build(found, given)
        super().__init__(module, objective)
