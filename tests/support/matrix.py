"""What goes with what, found out by short fits: the two tables of the Trainer's card.

Run in the folder `tests`, it writes them into the card: `python -m support.matrix`.
"""

from __future__ import annotations

import ast
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessRaisedException

from lightning_compress.trainer.compatibility import IncompatibleError
from lightning_compress.trainer.rules import PAIR_RULES, TRAINER_RULES, Rule
from support.ranks import TESTS, RankPair
from support.registry import (
    Entry,
    binary,
    block_gates,
    channel_gates,
    clustering,
    conv_blocks,
    depth,
    distillation,
    exits,
    lasso,
    low_rank,
    nuclear_norm,
    pruning,
    qat,
    scratch,
    supermask,
    ticket,
    widths,
)
from support.small import ManualModule, SmallModule, plain, quiet_trainer, shuffled

CARD = TESTS.parent / "lightning_compress" / "trainer" / "README.md"
WORKS = "works"
_STOP = {"monitor": "val_acc", "max_drop": 0.9}
_HINT = {"student": "net.conv", "teacher": "net.conv", "regressor": True, "channel_dim": 1}


def _pruning(**options: Any) -> Entry:
    return pruning(**({"end_epoch": 0.75, "every_n_steps": 1} | options))


def _neurons(**options: Any) -> Entry:
    return _pruning(granularity="neuron", amount=0.5, **options)


def _scratch(exclude: str = "", **options: Any) -> Entry:
    """Where another technique may have a residual network, as that file's is; a second one has other settings."""
    return scratch(residual=True, budget="computation" if exclude else "epochs", **options)


TECHNIQUES: dict[str, Callable[..., Entry]] = {
    "pruning": _pruning,
    "pruning, taylor": lambda **options: _pruning(criterion="taylor", **options),
    "pruning, fisher": lambda **options: _pruning(criterion="fisher", **options),
    "pruning, regrow": lambda **options: _pruning(regrow=True, **options),
    "pruning, stop": lambda **options: _pruning(stop=_STOP, **options),
    "neurons": _neurons,
    "neurons, during_fit": lambda **options: _neurons(shrink="during_fit", **options),
    "ticket": lambda **options: ticket(rounds=1, round_epochs=0.5, rewind_to=0, **options),
    "ticket, learning_rate": lambda **options: ticket(
        rounds=1, round_epochs=0.5, rewind_to=0, rewind="learning_rate", **options
    ),
    "group lasso": lasso,
    "group lasso, proximal": lambda **options: lasso(proximal=True, **options),
    "group lasso, shrink": lambda **options: lasso(granularity="group", proximal=True, shrink="on_fit_end", **options),
    "clustering": lambda **options: clustering(start_epoch=0.25, **options),
    "clustering, global": lambda **options: clustering(start_epoch=0.25, scope="global", **options),
    "binary": lambda **options: binary(start_epoch=0.5, **options),
    "supermask": supermask,
    "quantization": lambda **options: qat(start_epoch=0.5, **options),
    "quantization, tensor": lambda **options: qat(start_epoch=0.5, granularity="tensor", **options),
    "blocks": lambda **options: depth(end_epoch=0.75, every_n_steps=1, n_batches=2 if options.get("exclude") else 1),
    "low rank": lambda **options: low_rank(rank={"net.conv": 1} if options.get("exclude") else {"net.hidden": 4}),
    "nuclear norm": nuclear_norm,
    "convolutions": lambda **options: conv_blocks(target=f"net.block{2 if options.get('exclude') else 1}.*"),
    "scratch": _scratch,
    "scratch, thin": lambda **options: _scratch(thin=True, **options),
    "distillation": lambda **options: distillation(),
    "distillation, hints": lambda **options: distillation(hints=[_HINT]),
    "exits": lambda **options: exits(),
    "widths": lambda **options: widths((0.5,)),
    "channel gates": lambda **options: channel_gates(),
    "block gates": lambda **options: block_gates(),
}


PAIRED = [name for name in TECHNIQUES if name not in ("pruning, fisher", "group lasso, shrink", "distillation, hints")]


@dataclass(frozen=True)
class Setting:
    """Something of the Trainer, its callbacks, the module or its optimizers that techniques meet.

    `where`: "here", on two "ranks", or in "forks" of a process.
    """

    options: Mapping[str, Any]
    module: Callable[..., LightningModule] = SmallModule
    before: Callable[[], list[Any]] = list
    behind: Callable[[], list[Any]] = list
    where: str = "here"


class _Lbfgs(SmallModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)


class _Fused(SmallModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, fused=True)


def _compiled(**options: Any) -> SmallModule:
    module = SmallModule(**options)
    module.net.compile(backend="eager")
    return module


def _scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


_TOGETHER = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
SETTINGS: dict[str, Setting] = {
    "accumulation, clipping and bf16-mixed": Setting(_TOGETHER),
    "16-mixed": Setting({"plugins": "16-mixed"}),
    "16-mixed with a fused optimizer": Setting({"plugins": "16-mixed"}, _Fused),
    "16-true": Setting({"precision": "16-true"}),
    "manual optimization, two optimizers": Setting({}, ManualModule),
    "LBFGS": Setting({}, _Lbfgs),
    "torch.compile of the network": Setting({}, _compiled),
    "no validation": Setting({"limit_val_batches": 0}),
    "EMAWeightAveraging before it": Setting({}, before=lambda: [EMAWeightAveraging(decay=0.5)]),
    "EMAWeightAveraging behind it": Setting({}, behind=lambda: [EMAWeightAveraging(decay=0.5)]),
    "StochasticWeightAveraging": Setting({}, behind=lambda: [StochasticWeightAveraging(swa_lrs=0.01)]),
    "ddp": Setting({"strategy": "ddp"}, where="ranks"),
    "DDPStrategy(static_graph=True)": Setting({"static_graph": True}, where="ranks"),
    "ddp_fork": Setting({"strategy": "ddp_fork"}, where="forks"),
}


_ELSEWHERE = {  # what refuses without a rule, by words of its error, and the note on it
    "manual optimization": "Wrappers, and losses that are compared, run the user's own `training_step`, which manual "
    "optimization ends before its loss is known.",
    "which torch.compile has compiled": "Layers inside a compiled network can't be replaced: compile it after the fit.",
}
_SHORT = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1}


def fitted(entry: Entry, module: LightningModule, *, before: Any = (), behind: Any = (), **options: Any) -> str:
    """Fit a network for four steps: "works", or the name of the rule by which it is refused."""
    torch.manual_seed(0)
    callbacks = [*before, *entry.callbacks(), *behind]
    if options.pop("static_graph", False):
        options["strategy"] = DDPStrategy(static_graph=True)
    if options.get("plugins") == "16-mixed":
        options |= _scaled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer = quiet_trainer(callbacks=callbacks, **(_SHORT | options))
            trainer.fit(entry.wrap(module), shuffled(), plain())
        except IncompatibleError as error:
            return error.rule
        except ValueError as error:
            if (said := next((words for words in _ELSEWHERE if words in str(error)), None)) is not None:
                return said
            if "tells channels apart by their place" in str(error):  # as soon as widths look for their channels
                return "widths of a network with gates"
            raise
        except ProcessRaisedException as error:  # has the text of what was raised in the other process
            return next(rule.name for rule in TRAINER_RULES if _words(rule.reason) <= _words(str(error)))
    return WORKS


def _words(text: str) -> set[str]:
    return {word.strip(":,.") for word in text.split() if "{" not in word}


def pair(first: str, second: str) -> str:
    """Try two techniques, in this order, in one fit."""
    one, other = TECHNIQUES[first](), TECHNIQUES[second](exclude=() if first != second else "net.nothing")
    entry = one.with_(other)
    return fitted(entry, SmallModule(**entry.module))


def alone(technique: str, setting: str, **options: Any) -> str:
    """Try a technique with a setting; the options are added to the Trainer's."""
    known = SETTINGS[setting]
    entry = TECHNIQUES[technique]()
    return fitted(
        entry,
        known.module(**entry.module),
        before=known.before(),
        behind=known.behind(),
        **(dict(known.options) | options),
    )


def settings_row(setting: str, devices: int = 1) -> dict[str, str]:
    """Try all techniques with a setting; a job for two ranks as well."""
    return {technique: alone(technique, setting, devices=devices) for technique in TECHNIQUES}


def forked_row(setting: str) -> dict[str, str]:
    """Try all techniques with a setting that starts processes, from a process of its own."""
    script = f"from support.matrix import settings_row\nprint('@', settings_row({setting!r}, 2))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, str] = ast.literal_eval(next(one[2:] for one in done.stdout.splitlines() if one[:1] == "@"))
    return found


# ---------------------------------------------------------------------- the card's tables

_HEADS = (
    "<!-- techniques: written by tests/support/matrix.py -->",
    "<!-- settings: written by tests/support/matrix.py -->",
)
_END = "<!-- end -->"
_WORDS = {"one": "A", "other": "B", "names": "the same layers", "what": "C"}
RULES: dict[str, Rule] = {rule.name: rule for rule in (*PAIR_RULES, *TRAINER_RULES)}


def table(rows: Mapping[str, Mapping[str, str]], corner: str) -> str:
    """Write cells as a Markdown table, with a number for each rule that refuses, and the rules below."""
    columns = list(next(iter(rows.values())))
    met = dict.fromkeys(cell for row in rows.values() for cell in row.values() if cell != WORKS)
    numbers = {rule: str(number) for number, rule in enumerate(met, 1)}
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(numbers.get(cell, '✓') for cell in row.values())} |" for name, row in rows.items()
    ]
    notes = [f"{number}. {_note(rule)}" for rule, number in numbers.items()]
    return "\n".join([*lines, "", *notes])


def _note(rule: str) -> str:
    if rule in _ELSEWHERE:
        return _ELSEWHERE[rule]
    said = RULES[rule].said(_WORDS)
    return f"{said[0].upper()}{said[1:]}."


def recorded(text: str, corner: str) -> dict[str, dict[str, str]]:
    """Read the cells of a table that `table` has written: "works", or the number of a note."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {corner} |"))
    columns = _cells(lines[start])[1:]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = _cells(line)
        rows[name] = dict(zip(columns, (WORKS if cell == "✓" else cell for cell in cells), strict=True))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def notes(text: str, corner: str) -> dict[str, str]:
    """Read the notes below a table, by their numbers."""
    lines = iter(text[text.index(f"| {corner} |") :].splitlines())
    below = itertools.takewhile(
        lambda line: line != _END, itertools.dropwhile(lambda line: line.startswith("|"), lines)
    )
    return dict(line.split(". ", 1) for line in below if line)


PAIRS, ALONE = "A stands before B", "with"


def main() -> None:
    """Try every cell, and write both tables into the card."""
    logging.disable(logging.CRITICAL)
    pairs = {one: {other: pair(one, other) for other in PAIRED} for one in PAIRED}
    ranks = RankPair()
    alone: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, setting in SETTINGS.items():
            if setting.where == "ranks":
                alone[name] = ranks.run("support.matrix:settings_row", Path(scratch), setting=name, devices=2)[0]
            else:
                alone[name] = forked_row(name) if setting.where == "forks" else settings_row(name)
    ranks.close()
    text = CARD.read_text()
    for head, written in zip(_HEADS, (table(pairs, PAIRS), table(alone, ALONE)), strict=True):
        before, rest = text.split(head)
        text = f"{before}{head}\n\n{written}\n{_END}{rest.split(_END, 1)[1]}"
    CARD.write_text(text)


if __name__ == "__main__":
    main()
