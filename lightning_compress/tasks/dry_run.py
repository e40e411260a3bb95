"""The dry run: tables of the parameters that each technique would change, freeze or skip, with the reasons."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from rich.table import Table
from rich.text import Text

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.select import exact_patterns
from lightning_compress.pruning.callback import IterativePruningCallback
from lightning_compress.pruning.inspection import Verdict, inspect_channels, inspect_weights
from lightning_compress.tasks.inputs import example_inputs
from lightning_compress.trainer.effects import DeclaresEffects, Kind
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.targets import layers_of_fit
from lightning_compress.trainer.wrapper import CompressionModule

DONE: dict[Kind, str] = {
    "zeros": "pruned",
    "codebook": "clustered",
    "grid": "quantized",
    "signs": "binarized",
    "bounds": "bounded",
    "penalty": "pulled to zero in groups",
    "rank": "pulled to low rank",
}
STYLES = {"pruned": "bold", "follows": "", "frozen": "yellow", "skipped": "dim"}


def inspect_pruning(
    callback: IterativePruningCallback, module: LightningModule, datamodule: LightningDataModule
) -> list[Verdict]:
    """Return the callback's verdict on every parameter. The data are read only where channels are traced.

    Raises:
        ValueError: The callback's patterns, or its `network`, don't match the module.
    """
    target = callback.target
    if target is None:
        target = exact_patterns(layers_of_fit(None, module, callback.network).taken) or None
    if callback.granularity == "weight":
        return inspect_weights(module, target, exclude=callback.exclude)
    inputs = callback.example_inputs
    if inputs is None:
        inputs = _inputs(module, datamodule)
    resolve_network(module, callback.network)
    return inspect_channels(module, inputs, target, exclude=callback.exclude, network=callback.network)


def _inputs(module: LightningModule, datamodule: LightningDataModule) -> ExampleInputs:
    datamodule.prepare_data()
    datamodule.setup("fit")
    return example_inputs(module, datamodule, batch_size=2)


def inspection_table(name: str, callback: IterativePruningCallback, verdicts: list[Verdict]) -> Table:
    """Return a table of the verdicts; its caption says how many entries or channels `amount` removes."""
    unit = "entries" if callback.granularity == "weight" else "channels"
    free = sum(verdict.count for verdict in verdicts if verdict.action == "pruned")
    count = Counter(verdict.action for verdict in verdicts)
    table = Table(
        title=Text(f"{name}: {callback.granularity} pruning by {callback.criterion}", style="bold"),
        caption=Text(
            f"amount={callback.amount:g}, scope={callback.scope}: {round(callback.amount * free):,} of {free:,} "
            f"{unit} go. Parameters: {', '.join(f'{number} {action}' for action, number in count.items())}."
        ),
        caption_justify="left",
    )
    for heading in ("parameter", "shape"):
        table.add_column(heading, overflow="fold")
    table.add_column(unit, justify="right", no_wrap=True)
    table.add_column("what happens", overflow="fold")
    for verdict in verdicts:
        shape = " x ".join(map(str, verdict.shape))
        units = f"{verdict.count:,}" if verdict.count else ""
        happens = f"{verdict.action}: {verdict.reason}" if verdict.reason else verdict.action
        # rich would read a name such as "[a]" in a plain string as markup.
        table.add_row(*map(Text, (verdict.name, shape, units, happens)), style=STYLES[verdict.action])
    return table


def effects_table(name: str, callback: DeclaresEffects, module: LightningModule) -> Table:
    """Return a table of the effects that a technique declares.

    The table lists all tensors with two or more dimensions, and every other parameter that the technique changes.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        effects = callback.effects(None, module)
    count = Counter(effects.values.values())
    done = ", ".join(f"{number} {DONE[kind]}" for kind, number in count.items()) or "nothing is changed"
    inputs = f"; inputs of {len(effects.inputs)} layers are quantized" if effects.inputs else ""
    notes = "".join(f" {one.message}" for one in said)
    table = Table(
        title=Text(f"{name}: {callback.name}", style="bold"),
        caption=Text(f"Parameters: {done}{inputs}.{notes}"),
        caption_justify="left",
    )
    for heading in ("parameter", "shape", "what happens"):
        table.add_column(heading, overflow="fold")
    for parameter, tensor in module.named_parameters():
        layer = parameter.rpartition(".")[0]
        happens = DONE[effects.values[parameter]] if parameter in effects.values else ""
        if layer in effects.inputs:
            happens = f"{happens}, and the layer's inputs quantized" if happens else "the layer's inputs are quantized"
        if happens or tensor.dim() > 1:
            shape, skipped = " x ".join(map(str, tensor.shape)), "skipped: target and exclude leave it out"
            table.add_row(*map(Text, (parameter, shape, happens or skipped)), style="bold" if happens else "dim")
    return table


def outline_table(name: str, wrapper: CompressionModule, datamodule: LightningDataModule) -> Table | None:
    """Return a table of what a wrapper would add; None where the wrapper does not say."""
    outline = wrapper.outline(_inputs(wrapper, datamodule))
    if outline is None:
        return None
    level = wrapper._lightning_compress.levels[-1]
    return _outlined(name, level.callback.name, outline)


def _outlined(name: str, technique: str, outline: Outline) -> Table:
    table = Table(title=Text(f"{name}: {technique}", style="bold"), caption=Text(outline.note), caption_justify="left")
    for heading in outline.columns:
        table.add_column(heading, overflow="fold")
    for row in outline.rows:
        table.add_row(*map(Text, row))
    return table


def inspection_tables(
    callbacks: Mapping[str, Callback],
    module: LightningModule,
    datamodule: LightningDataModule,
    wrappers: Mapping[str, LightningModule] | None = None,
) -> list[Table | Text]:
    """Return one table per technique.

    Args:
        callbacks: The callbacks, of which the others are passed over.
        module: The untrained module.
        datamodule: Its data, which are read only where a network is traced.
        wrappers: Copies of the module by name, each inside one wrapper, or bare where the wrapper needs a training.

    Raises:
        ValueError: None of the callbacks is a technique, and there is no wrapper.
    """
    tables: list[Table | Text] = []
    for name, one in callbacks.items():
        if isinstance(one, IterativePruningCallback):
            tables.append(inspection_table(name, one, inspect_pruning(one, module, datamodule)))
        elif isinstance(one, DeclaresEffects):
            outline = one.outline(module, partial(_inputs, module, datamodule))
            table = None if outline is None else _outlined(name, one.name, outline)
            tables.append(effects_table(name, one, module) if table is None else table)
    for name, wrapped in (wrappers or {}).items():
        table = outline_table(name, wrapped, datamodule) if isinstance(wrapped, CompressionModule) else None
        said = f"{name}: this wrapper changes the training objective, and is not inspected."
        tables.append(Text(said, style="bold") if table is None else table)
    if not tables:
        raise ValueError(
            f"There is nothing to inspect: none of the callbacks ({', '.join(callbacks) or 'none'}) changes the "
            f"network. Choose a technique, for instance compress=iterative_pruning."
        )
    return tables
