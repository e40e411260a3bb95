"""Save and restore the metrics of an unfinished epoch, which Lightning's checkpoints lack.

Callbacks that monitor a metric need the logged values. Hooks at the epoch's end need the metrics that the module
updates itself, and the numbers that it counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

from lightning_compress.core.distributed import rank, world_size
from lightning_compress.trainer.unwrap import innermost

_ARGUMENTS = ("prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "metric_attribute")


class _Arguments(_Metadata):
    """The arguments of an earlier call of `log`, which the next call may replace by others."""

    def __ne__(self, other: object) -> bool:
        vars(self).update(vars(other))
        self.__class__ = _Metadata  # type: ignore[assignment]
        return False


def numbers(pl_module: LightningModule) -> dict[str, dict[str, Any]]:
    """Return the numbers that a module and its metrics have as attributes, by path and name."""
    holders = {"": innermost(pl_module)} | _metrics(pl_module)
    return {
        path: {name: _copied(value) for name, value in vars(holder).items() if _is_number(value)}
        for path, holder in holders.items()
    }


def capture(trainer: Trainer, pl_module: LightningModule, before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics that this process has logged, and its sums over the unfinished epoch.

    Args:
        trainer: The Trainer of the fit.
        pl_module: The LightningModule.
        before: The module's `numbers` when the fit began; those that still have the same value are not saved.
    """
    state: dict[str, Any] = {"seen": _copy(trainer._logger_connector._callback_metrics), "sums": [], "lost": []}
    state["gathered"] = gathered(pl_module)
    state["numbers"] = {
        path: {name: value for name, value in now.items() if before.get(path, {}).get(name) != value}
        for path, now in numbers(pl_module).items()
    }
    state["metrics"] = _states(_unlogged(trainer, pl_module))
    epochs = trainer.fit_loop.epoch_progress.total
    if epochs.started == epochs.processed:  # type: ignore[attr-defined]
        return state
    names = {id(module): name for name, module in _metrics(pl_module).items()}
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
                "states": _states(_metrics(result if result.is_tensor else result.value)),
            }
        )
    return state


def gathered(pl_module: LightningModule) -> list[str]:
    """Return the names of the lists of tensors that the module fills in its steps, as for the end of an epoch."""
    module = innermost(pl_module)
    lists = {name: value for name, value in vars(module).items() if isinstance(value, list) and value}
    found = [name for name, value in lists.items() if all(_holds_tensor(one) for one in value)]
    return found + [name for name, one in module.named_modules() if isinstance(one, MetricTracker) and one.n_steps]


def _holds_tensor(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Tensor | Metric) or any(_holds_tensor(one) for one in inner)


def _metrics(module: nn.Module) -> dict[str, Metric]:
    return {name: one for name, one in module.named_modules() if isinstance(one, Metric)}


def _unlogged(trainer: Trainer, pl_module: LightningModule) -> dict[str, Metric]:
    """Return the updated metrics whose sums Lightning does not keep."""
    for module in pl_module.modules():
        if isinstance(module, MetricCollection):
            module.values(copy_state=False)  # copies the sums that its metrics share into each of them
    loop = trainer.fit_loop.epoch_loop
    results = [*loop._results.result_metrics, *loop.val_loop._results.result_metrics]
    logged = {id(one) for result in results if not result.has_reset for one in _modules(result.value)}
    return {name: one for name, one in _metrics(pl_module).items() if one.update_count and id(one) not in logged}


def _modules(value: Any) -> Iterable[nn.Module]:
    return value.modules() if isinstance(value, nn.Module) else ()


def _states(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: {"count": one.update_count, "values": _copy(one.metric_state)} for name, one in metrics.items()}


def _put(metric: Metric, kept: Mapping[str, Any], device: torch.device) -> None:
    for name, content in _moved(kept["values"], device).items():
        setattr(metric, name, content)
    metric._update_count, metric._computed = kept["count"], None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or (type(value) is Tensor and value.dim() == 0)


def _copied(value: Any) -> Any:
    return _each(value, lambda one: one.detach().cpu().clone())


def restore(
    trainer: Trainer, pl_module: LightningModule, states: Sequence[Mapping[str, Any] | None], *, inside: bool
) -> bool:
    """Restore what `capture` returned on each rank, `inside` an epoch with its sums; return whether all is restored."""
    state = states[rank() if rank() < len(states) else 0] if states else None
    if state is None:
        return False
    if inside and len(states) != world_size() and state["sums"]:
        warnings.warn(
            f"The checkpoint holds the sums of the epoch's logged training metrics of {len(states)} process(es), and "
            f"{world_size()} train now: each goes on with the sums of one of them, and the means of this epoch may "
            f"differ from the uninterrupted run's. Resume with as many processes for exact means.",
            stacklevel=2,
        )
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    connector._callback_metrics = _moved(state["seen"], pl_module.device) | connector._callback_metrics
    metrics = _metrics(pl_module)
    for path, kept in state.get("metrics", {}).items():
        if path in metrics:
            _put(metrics[path], kept, pl_module.device)
    for path, values in state.get("numbers", {}).items():
        holder = metrics.get(path) if path else innermost(pl_module)
        for name, value in values.items():
            if holder is not None and _is_number(vars(holder).get(name, value)):
                setattr(holder, name, _each(value, lambda one: one.to(pl_module.device)))
    if not inside:
        return True
    connector._first_loop_iter = True  # otherwise the next batch resets the sums, as the epoch's first
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
            _put(metric, kept, device)
    if lost:
        warnings.warn(
            f"The sums of the logged training metrics {', '.join(sorted(set(lost)))} are not in the checkpoint (they "
            f"are synchronized in a process group, or a torchmetrics.Metric that is no attribute of the module): this "
            f"epoch's values cover only the batches after the resume. Assign such a metric to the module.",
            stacklevel=2,
        )
    return not lost


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) for key, value in values.items()}


def _moved(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: _each(value, lambda one: one.to(device)) for key, value in values.items()}


def _each(value: Any, act: Any) -> Any:
    if isinstance(value, Tensor):
        return act(value)
    return [_each(one, act) for one in value] if isinstance(value, list) else value
