"""What a run has logged in an epoch that has not ended: Lightning's checkpoints lack it, and monitors need it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from torch import Tensor
from torchmetrics import Metric

from lightning_compress.trainer.distributed import rank, world_size
from lightning_compress.trainer.inside import innermost

_ARGUMENTS = ("prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "metric_attribute")


class _Arguments(_Metadata):
    """Those with which a metric was logged before; the next call of `log` brings its own, which may be others."""

    def __ne__(self, other: object) -> bool:
        vars(self).update(vars(other))
        self.__class__ = _Metadata  # type: ignore[assignment]
        return False


def capture(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return what this process has logged: what monitors see, and the sums of the epoch that has not ended."""
    state: dict[str, Any] = {"seen": _copy(trainer._logger_connector._callback_metrics), "sums": [], "lost": []}
    state["gathered"] = gathered(pl_module)
    epochs = trainer.fit_loop.epoch_progress.total
    if epochs.started == epochs.processed:  # type: ignore[attr-defined]
        return state
    names = {id(module): name for name, module in pl_module.named_modules() if isinstance(module, Metric)}
    for result in trainer.fit_loop.epoch_loop._results.result_metrics:
        meta = result.meta
        if result.has_reset or not meta.on_epoch:
            continue
        if meta.sync.group is not None or not (result.is_tensor or id(result.value) in names):
            state["lost"].append(meta.name)
            continue
        state["sums"].append(
            {
                "fx": meta.fx,
                "name": meta.name,
                "reduce_fx": meta.reduce_fx.__name__,
                "sync_dist": meta.sync.should,
                "rank_zero_only": meta.sync.rank_zero_only,
                "arguments": {name: getattr(meta, name) for name in _ARGUMENTS},
                "here": not result.is_tensor or result.value.device == pl_module.device,
                "metric": None if result.is_tensor else names[id(result.value)],
                "states": {
                    name: {"count": metric.update_count, "values": _copy(metric.metric_state)}
                    for name, metric in (result if result.is_tensor else result.value).named_modules()
                    if isinstance(metric, Metric)
                },
            }
        )
    return state


def gathered(pl_module: LightningModule) -> list[str]:
    """Names of the lists of tensors that the module itself fills in its steps, as for the end of an epoch."""
    lists = {name: value for name, value in vars(innermost(pl_module)).items() if isinstance(value, list) and value}
    return [name for name, value in lists.items() if all(_holds_tensor(one) for one in value)]


def _holds_tensor(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Tensor) or any(_holds_tensor(one) for one in inner)


def restore(
    trainer: Trainer, pl_module: LightningModule, states: Sequence[Mapping[str, Any] | None], *, inside: bool
) -> bool:
    """Put back what `capture` returned on each rank, `inside` an epoch its sums too; return whether that was all."""
    state = states[rank() if rank() < len(states) else 0] if states else None
    if state is None:
        return False
    if inside and len(states) != world_size() and state["sums"]:
        warnings.warn(
            f"The checkpoint holds the sums of the epoch's logged training metrics of {len(states)} process(es), and "
            f"{world_size()} train now: each goes on with the sums of one of them, and the means of this epoch may "
            f"differ from the uninterrupted run's.",
            stacklevel=2,
        )
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    connector._callback_metrics = _moved(state["seen"], pl_module.device) | connector._callback_metrics
    if not inside:
        return True
    connector._first_loop_iter = True  # else the next batch counts as the epoch's first, which begins sums anew
    modules, lost = dict(pl_module.named_modules()), list(state["lost"])
    for one in state["sums"]:
        fx, name = one["fx"], one["name"]
        key = f"{fx}.{name}"
        value = torch.zeros((), device=pl_module.device) if one["metric"] is None else modules.get(one["metric"])
        if value is None:
            lost.append(name)
        if value is None or key in results:
            continue
        results.log(
            fx,
            name,
            value,
            reduce_fx=one["reduce_fx"],
            sync_dist=one["sync_dist"],
            sync_dist_fn=trainer.strategy.reduce,
            rank_zero_only=one["rank_zero_only"],
            **one["arguments"],
        )
        results[key].meta.__class__ = _Arguments
        device = pl_module.device if one["here"] else torch.device("cpu")
        for path, kept in one["states"].items():
            metric = results[key] if one["metric"] is None else modules[one["metric"]].get_submodule(path)
            for attribute, content in _moved(kept["values"], device).items():
                setattr(metric, attribute, content)
            metric._update_count, metric._computed = kept["count"], None
    if lost:
        warnings.warn(
            f"The sums of the logged training metrics {', '.join(sorted(set(lost)))} are not in the checkpoint (they "
            f"are synchronized in a process group, or a torchmetrics.Metric that is no attribute of the module): this "
            f"epoch's values cover only the batches after the resume.",
            stacklevel=2,
        )
    return not lost


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _each(value, lambda one: one.detach().cpu().clone()) for key, value in values.items()}


def _moved(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: _each(value, lambda one: one.to(device)) for key, value in values.items()}


def _each(value: Any, act: Any) -> Any:
    if isinstance(value, Tensor):
        return act(value)
    return [_each(one, act) for one in value] if isinstance(value, list) else value
