"""Weight clustering as a callback: the weights of a layer share a few values, which train on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.clustering.kmeans import Init, check_init, kmeans
from lightning_compress.clustering.shared_weights import GradientRule, SharedWeights, check_rule
from lightning_compress.core.numbers_by_pattern import numbers_by_name
from lightning_compress.core.projection import Projection
from lightning_compress.core.select import refuse_sparse_gradients
from lightning_compress.core.tensors import Kept
from lightning_compress.trainer.callback import CompressionCallback, latent_values, techniques
from lightning_compress.trainer.distributed import broadcast
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.once import QuantizingCallback

_ALL = "*"  # the key of the one codebook of scope="global"


class _SharedProjection(Projection):
    """A projection on shared values, which first takes entries that have become zero out of their clusters."""

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
    """Clusters the weights of each layer once and trains the cluster's shared values on.

    At `start_epoch` the k values c that minimise the sum over weights w of min over j of (w - c_j)^2 replace the
    weights. Then dL/dc_j = mean (or sum) over the cluster of dL/dw, in place of each gradient before the optimizer's
    step and before clipping, and after it every weight is the mean over its cluster. Weights that are exactly zero,
    then or later, have been pruned: they stay zero and belong to no cluster. `compress/bits_per_weight` (indices and
    tables, before any entropy coding) and `compress/clusters` (shared values in all) are logged once an epoch.

    Args:
        n_clusters: How many values a layer's non-zero weights share, k; 0 changes nothing. Or `{pattern: k}`, patterns
            as in `target`, of which the first that matches counts: `{"conv*": 256, "fc*": 32}`. Layers that no pattern
            names stay as they are, which is said aloud, and so do those with 0.
        init: Where the k-means begins: "optimal", or, to see why not, "linear" (evenly from the smallest weight to the
            largest) or "density" (quantiles).
        start_epoch: When weights are clustered, in epochs, which may be fractions.
        gradient: "mean" keeps the scale of a single weight's gradient, and so the optimizer's settings. "sum" is the
            derivative by the shared value; it grows with the cluster, and SGD diverges at its dense learning rate.
        scope: "layer" makes a codebook for each layer, "global" one for all of them together.
        target: Patterns of modules (their `weight`) or parameters; by default the linear layers and convolutions that
            an optimizer trains when the fit begins and that the code of `forward` reaches, or what the patterns of
            `n_clusters` name.
        exclude: Patterns to leave out.

    Raises:
        ValueError: An argument is out of range, or the combination makes no sense.

    References:
        Han et al. 2016, "Deep Compression", section 3.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> clustering = WeightClusteringCallback({"conv*": 256, "fc*": 32}, start_epoch=6.0)
        >>> trainer = Trainer(callbacks=[clustering], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    verb, done = "cluster", "clustered"
    kind = "codebook"
    compares_values = False  # that takes as long as sharing them

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
        super().__init__(
            n_clusters=n_clusters,
            init=init,
            start_epoch=start_epoch,
            gradient=gradient,
            scope=scope,
            target=target,
            exclude=exclude,
        )
        _check_numbers(n_clusters, scope)
        check_init(init)
        check_rule(gradient)
        if scope not in ("layer", "global"):
            raise ValueError(f"scope must be 'layer' or 'global'; got {scope!r}.")
        self.n_clusters = n_clusters
        self.init: Init = init
        self.gradient: GradientRule = gradient
        self.scope = scope

        self._wanted: dict[str, int]  # clusters by parameter
        self._shared: dict[str, SharedWeights] = {}  # by parameter, or by _ALL
        self._beside: list[CompressionCallback] = []  # the other techniques of the fit

    # ------------------------------------------------------------------ what has been reached

    @property
    def codebooks(self) -> dict[str, Tensor]:
        """The shared values, by parameter name ("*" for scope="global"); the first is 0 and stands for pruned."""
        return {key: shared.codebook for key, shared in self._shared.items()}

    @property
    def indices(self) -> dict[str, Tensor]:
        """For each clustered parameter the position of every entry's value in its codebook."""
        return {name: index for shared in self._shared.values() for name, index in shared.index.items()}

    @property
    def bits_per_weight(self) -> float:
        """Bits for an index and a share of the codebook, over the clustered weights; 32 before."""
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
        self._beside = [one for one in techniques(trainer) if one is not self]
        if state is not None:
            self._shared = {}
            self._share(pl_module, state["codebooks"], state["indices"])
        elif self._shared:
            self._share(pl_module, self.codebooks, self.indices)  # perhaps on another device
            self._check_clustered()

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> str:
        parameters = dict(pl_module.named_parameters())
        for key, names in self._groups().items():
            together = {name: parameters[name] for name in names}
            self._shared[key] = SharedWeights.nearest(together, self._means(together, self._wanted[names[0]]))
        self._hold()
        return f"weights are clustered to {self.bits_per_weight:.3g} bits each"

    def _means(self, parameters: Mapping[str, nn.Parameter], k: int) -> Tensor:
        tensors = [parameter.detach() for parameter in parameters.values()]
        means = kmeans(tensors, k, init=self.init, keep_zero=True, names=list(parameters))
        padded = torch.full((k + 1,), torch.nan, dtype=torch.float64)
        padded[: len(means)] = means
        agreed = broadcast(padded.to(tensors[0].device)).cpu()
        return agreed[~agreed.isnan()]

    def _groups(self) -> dict[str, list[str]]:
        """The parameters of every codebook."""
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
        self._hold()

    def _hold(self) -> None:
        parameters = {name: p for shared in self._shared.values() for name, p in shared.parameters.items()}
        self.projection = _SharedProjection(parameters, self._project, self._share_written) if parameters else None

    def _project(self, tensors: Mapping[str, Tensor]) -> None:
        for shared in self._shared.values():
            if any(name in tensors for name in shared.parameters):
                own = all(tensors.get(name) is parameter for name, parameter in shared.parameters.items())
                shared.share_values(None if own else tensors)

    def _share_written(self, names: Collection[str]) -> None:
        """Share the values of clusters anew, where other code has written into them."""
        self._take_zeros()
        behind = self._behind()
        for shared in self._shared.values():
            # What another callback holds on a grid, it takes care of.
            elsewhere = behind.keys() & shared.parameters.keys() or shared.parameters.keys().isdisjoint(names)
            if not elsewhere and not shared.holds():
                shared.share_values()

    def _check_clustered(self) -> None:
        for key, shared in self._shared.items():
            if not shared.holds():
                raise ValueError(
                    f"{key} no longer holds the shared values of an earlier fit with this callback. To cluster this "
                    f"network from the beginning, make a new callback."
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
        """Slice the indices of what another callback has cut."""
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
            shared.share_gradients(self.gradient, behind=self._behind())

    def check_announced(self, optimizer: torch.optim.Optimizer) -> None:
        raise RuntimeError(
            "An optimizer stepped without on_before_optimizer_step, so the weights of a cluster had different "
            "gradients. Step it through Lightning: `self.optimizers()` with its default use_pl_optimizer=True."
        )

    def _take_zeros(self) -> None:
        behind = self._behind()
        for shared in self._shared.values():
            shared.take_zeros(behind)

    def _behind(self) -> dict[str, Tensor]:
        """The shared values themselves, where another callback has put them on a grid."""
        return latent_values(self._beside)

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> list[SharedWeights]:
        share = {} if self.projection is None else self.projection.share(optimizer)
        return [shared for shared in self._shared.values() if any(name in share for name in shared.parameters)]

    # ------------------------------------------------------------------ checkpoints

    def technique_state(self) -> dict[str, Any]:
        self._take_zeros()
        return super().technique_state() | {"codebooks": self.codebooks, "indices": self.indices}


def _check_numbers(n_clusters: int | Mapping[str, int], scope: str) -> None:
    if isinstance(n_clusters, Mapping) and scope == "global":
        raise ValueError("scope='global' has one codebook for all layers: n_clusters must be one number.")
    if isinstance(n_clusters, Mapping) and not n_clusters:
        raise ValueError("n_clusters={} names no layer: give {pattern: number}, or 0 to change nothing.")
    for k in n_clusters.values() if isinstance(n_clusters, Mapping) else (n_clusters,):
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise ValueError(
                f"n_clusters must be a whole number, 1 or more, or 0 to change nothing; got {n_clusters!r}."
            )
