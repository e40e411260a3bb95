"""Weight clustering as a callback: the weights of a layer share a few values, and these are trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.clustering.kmeans import Init, check_init, kmeans
from lightning_compress.clustering.shared_weights import GradientRule, SharedWeights, check_rule
from lightning_compress.core.distributed import broadcast
from lightning_compress.core.given import whole_number
from lightning_compress.core.numbers_by_pattern import numbers_by_name
from lightning_compress.core.projection import Projection
from lightning_compress.core.select import refuse_sparse_gradients
from lightning_compress.core.tensors import Kept
from lightning_compress.trainer.callback import CompressionCallback, latent_values, techniques
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.once import QuantizingCallback
from lightning_compress.trainer.settings import settings_of

_ALL = "*"  # the key of the codebook with scope="global"


class _SharedProjection(Projection):
    """A projection onto shared values.

    Args:
        parameters: The clustered parameters, by name.
        project: Sets the given tensors to shared values.
        share_written: Sets the named parameters to shared values after other code has written to them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        project: Callable[[Mapping[str, Tensor]], None],
        share_written: Callable[[Collection[str]], None],
    ) -> None:
        super().__init__(parameters, project, keep_latent=False)
        self._share_written = share_written

    def rewrite(self, share: Mapping[str, nn.Parameter] | None = None) -> None:
        share = self.parameters if share is None else share
        with self._write(share):
            self._share_written(share.keys())


class WeightClusteringCallback(QuantizingCallback):
    """Clusters the weights of each layer once, then trains the values that the weights of a cluster share.

    At `start_epoch` each weight is replaced by the nearest of k values c, which minimise the sum over weights w of min
    over j of (w - c_j)^2. From then on, before clipping and the optimizer's step, each gradient is replaced by
    dL/dc_j = mean (or sum) of dL/dw over the cluster, and after the step each weight by the mean over its cluster.
    Weights that are exactly zero, at that moment or later, count as pruned: they stay zero and belong to no cluster.
    Once an epoch the callback logs `compress/bits_per_weight` (indices and codebooks, before entropy coding) and
    `compress/clusters` (the number of shared values of all codebooks).

    Args:
        n_clusters: The number k of values that the non-zero weights of a layer share; 0 leaves them unchanged. Or
            `{pattern: k}`, with patterns as in `target`: `{"conv*": 256, "fc*": 32}`. The first pattern that matches a
            layer counts. A layer that no pattern matches stays unchanged, with a warning.
        init: How the k-means is initialised: "optimal"; or, for comparison, "linear" (evenly from the smallest weight
            to the largest) or "density" (quantiles).
        start_epoch: When the weights are clustered, in epochs; fractions are allowed.
        gradient: "mean" keeps the scale of a single weight's gradient, so the optimizer's settings stay valid. "sum" is
            the derivative with respect to the shared value. It grows with the cluster: SGD diverges with it at the
            learning rate of dense training.
        scope: "layer" makes a codebook for each layer, "global" one codebook for all layers.
        target: Patterns of modules (their `weight`) or parameters. By default: what the patterns of `n_clusters` name;
            without patterns, the linear layers and convolutions that an optimizer trains when the fit begins and that
            the code of `forward` reaches.
        exclude: Patterns of what stays unchanged.

    Raises:
        ValueError: An argument is out of range, or `scope="global"` is combined with patterns.

    References:
        Han et al. 2016, "Deep Compression", section 3.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> clustering = WeightClusteringCallback({"conv*": 256, "fc*": 32}, start_epoch=6.0)
        >>> trainer = Trainer(callbacks=[clustering], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    verb, done = "cluster", "clustered"
    kind = "codebook"
    compares_values = False  # comparing would take as long as sharing the values

    def __init__(
        self,
        n_clusters: int | Mapping[str, int] = 16,
        *,
        init: Init = "optimal",
        start_epoch: float = 0.0,
        gradient: GradientRule = "mean",
        scope: Literal["layer", "global"] = "layer",
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        n_clusters = dict(n_clusters) if isinstance(n_clusters, Mapping) else n_clusters
        super().__init__(**settings_of(locals()))
        _check_numbers(n_clusters, scope)
        check_init(init)
        check_rule(gradient)
        if scope not in ("layer", "global"):
            raise ValueError(f"scope must be 'layer' or 'global'; got {scope!r}.")
        self.n_clusters = n_clusters
        self.init: Init = init
        self.gradient: GradientRule = gradient
        self.scope = scope

        self._wanted: dict[str, int]  # number of clusters, by parameter name
        self._shared: dict[str, SharedWeights] = {}  # by parameter name, or by _ALL
        self._other_techniques: list[CompressionCallback] = []

    # ------------------------------------------------------------------ what has been reached

    @property
    def codebooks(self) -> dict[str, Tensor]:
        """The shared values by parameter name ("*" with scope="global"); the first is 0, for pruned weights."""
        return {key: shared.codebook for key, shared in self._shared.items()}

    @property
    def indices(self) -> dict[str, Tensor]:
        """For each clustered parameter, by name, the positions of its entries in the codebook."""
        return {name: index for shared in self._shared.values() for name, index in shared.index.items()}

    @property
    def bits_per_weight(self) -> float:
        """Bits for the index and a share of the codebook, averaged over the clustered weights; 32 before clustering."""
        sizes = [sum(p.numel() for p in shared.parameters.values()) for shared in self._shared.values()]
        bits = [shared.bits_per_weight for shared in self._shared.values()]
        return sum(n * b for n, b in zip(sizes, bits, strict=True)) / sum(sizes) if sizes else 32.0

    # ------------------------------------------------------------------ the fit

    def wants(self, pl_module: LightningModule) -> dict[str, int]:
        return numbers_by_name(
            pl_module,
            self.n_clusters,
            target=self.target,
            default=self.patterns(pl_module, named=isinstance(self.n_clusters, Mapping)),
            exclude=self.exclude,
            argument="n_clusters",
            done="clustered",
            leaving="0",
        )

    def shared_effects(self) -> Effects:
        return Effects(span="network" if self.scope == "global" else "tensor", options={"span": "scope='global'"})

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        super().prepare(trainer, pl_module, state)
        refuse_sparse_gradients(pl_module, self._wanted, self.name)
        self._other_techniques = [one for one in techniques(trainer) if one is not self]
        if state is not None:
            self._shared = {}
            self._share(pl_module, state["codebooks"], state["indices"])
        elif self._shared:
            self._share(pl_module, self.codebooks, self.indices)  # the device may have changed since the earlier fit
            self._check_clustered()

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> str:
        parameters = dict(pl_module.named_parameters())
        for key, names in self._groups().items():
            together = {name: parameters[name] for name in names}
            self._shared[key] = SharedWeights.nearest(together, self._means(together, self._wanted[names[0]]))
        self._set_projection()
        return f"weights are clustered to {self.bits_per_weight:.3g} bits each"

    def _means(self, parameters: Mapping[str, nn.Parameter], k: int) -> Tensor:
        tensors = [parameter.detach() for parameter in parameters.values()]
        means = kmeans(tensors, k, init=self.init, keep_zero=True, names=list(parameters))
        padded = torch.full((k + 1,), torch.nan, dtype=torch.float64)
        padded[: len(means)] = means
        agreed = broadcast(padded.to(tensors[0].device)).cpu()
        return agreed[~agreed.isnan()]

    def _groups(self) -> dict[str, list[str]]:
        """Return the names of the parameters of each codebook, by its key."""
        if self.scope == "global":
            return {_ALL: list(self._wanted)} if self._wanted else {}
        return {name: [name] for name in self._wanted}

    def _share(
        self, pl_module: LightningModule, codebooks: Mapping[str, Tensor], indices: Mapping[str, Tensor]
    ) -> None:
        parameters = dict(pl_module.named_parameters())
        for key, codebook in codebooks.items():
            names = list(indices) if key == _ALL else [key]
            self._shared[key] = SharedWeights({name: parameters[name] for name in names}, codebook, indices)
        self._set_projection()

    def _set_projection(self) -> None:
        parameters = {name: p for shared in self._shared.values() for name, p in shared.parameters.items()}
        self.projection = _SharedProjection(parameters, self._project, self._share_written) if parameters else None

    def _project(self, tensors: Mapping[str, Tensor]) -> None:
        for shared in self._shared.values():
            if any(name in tensors for name in shared.parameters):
                own = all(tensors.get(name) is parameter for name, parameter in shared.parameters.items())
                shared.share_values(None if own else tensors)

    def _share_written(self, names: Collection[str]) -> None:
        """Set weights to shared values again, after other code has written to the named parameters."""
        self._take_zeros()
        latent = self._latent_values()
        for shared in self._shared.values():
            # Parameters with latent values are written by the callback that quantizes them to a grid.
            elsewhere = latent.keys() & shared.parameters.keys() or shared.parameters.keys().isdisjoint(names)
            if not elsewhere and not shared.holds():
                shared.share_values()

    def _check_clustered(self) -> None:
        for key, shared in self._shared.items():
            if not shared.holds():
                raise ValueError(
                    f"{key} no longer holds the shared values that an earlier fit with this callback gave it. To "
                    f"cluster this network anew, make a new callback."
                )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_zeros()
        super().on_train_epoch_end(trainer, pl_module)

    def numbers(self) -> dict[str, Callable[[], float]]:
        return {
            "bits_per_weight": lambda: self.bits_per_weight,
            "clusters": lambda: float(sum(shared.n_values for shared in self._shared.values())),
        }

    def project_copy(self, module: nn.Module) -> None:
        copies = dict(module.named_parameters())
        for shared in self._shared.values():
            if shared.parameters.keys() <= copies.keys():
                shared.share_values(copies)

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        """Slice the indices of parameters that another callback has cut."""
        indices = dict(self.indices)
        for name in indices.keys() & kept.keys():
            for dim, positions in kept[name].items():
                indices[name] = indices[name].index_select(dim, positions.to(indices[name].device))
        self._share(pl_module, self.codebooks, indices)

    # ------------------------------------------------------------------ around the optimizer's step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        for shared in self._stepped_by(optimizer):
            shared.share_gradients(self.gradient, behind=self._latent_values())

    def check_announced(self, optimizer: torch.optim.Optimizer) -> None:
        raise RuntimeError(
            "An optimizer stepped without on_before_optimizer_step, so the weights of a cluster had different "
            "gradients. Step it through Lightning: call `step` of what `self.optimizers()` returns by default, with "
            "use_pl_optimizer=True."
        )

    def _take_zeros(self) -> None:
        latent = self._latent_values()
        for shared in self._shared.values():
            shared.take_zeros(latent)

    def _latent_values(self) -> dict[str, Tensor]:
        """Return the shared values of parameters that another callback has quantized to a grid."""
        return latent_values(self._other_techniques)

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> list[SharedWeights]:
        share = {} if self.projection is None else self.projection.share(optimizer)
        return [shared for shared in self._shared.values() if any(name in share for name in shared.parameters)]

    # ------------------------------------------------------------------ checkpoints

    def technique_state(self) -> dict[str, Any]:
        self._take_zeros()
        return super().technique_state() | {"codebooks": self.codebooks, "indices": self.indices}


def _check_numbers(n_clusters: int | Mapping[str, int], scope: str) -> None:
    if isinstance(n_clusters, Mapping) and scope == "global":
        raise ValueError(
            f"scope='global' makes one codebook for all layers, so n_clusters must be one number; got {n_clusters!r}."
        )
    if isinstance(n_clusters, Mapping) and not n_clusters:
        raise ValueError("n_clusters={} names no layer. Give {pattern: number}, or 0 to change nothing.")
    given = n_clusters if isinstance(n_clusters, Mapping) else {None: n_clusters}
    for pattern, k in given.items():
        name = "n_clusters" if pattern is None else f"n_clusters[{pattern!r}]"
        whole_number(k, f"{name} must be a whole number, at least 1, or 0 to change nothing", least=0)
