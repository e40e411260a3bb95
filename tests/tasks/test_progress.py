from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress import tqdm_progress
from lightning.pytorch.loggers import CSVLogger
from support.small import SmallModule, plain

from lightning_compress.tasks.progress import RunProgress


def test_the_bar_has_short_names_and_counts_the_epochs_of_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    states: list[tuple[int, int]] = []

    class Spy(tqdm_progress.Tqdm):
        def update(self, n: int = 1) -> None:
            super().update(n)
            if self.desc.startswith("Whole run"):
                states.append((self.n, self.total))

    monkeypatch.setattr("lightning_compress.tasks.progress.Tqdm", Spy)

    class Module(SmallModule):
        def training_step(self, *args: object) -> object:
            self.log("compress/sparsity", 0.5, prog_bar=True)
            self.log("train/size", 1.0, prog_bar=True)
            self.log("val/size", 2.0, prog_bar=True)
            return super().training_step(*args)

    bar = RunProgress(before=3, total=5)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[bar], logger=CSVLogger(tmp_path), enable_checkpointing=False
    )
    trainer.fit(Module(), plain())
    assert states == [(4, 5), (5, 5)]
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert "sparsity" in shown
    assert "v_num" not in shown
    assert (shown["train/size"], shown["val/size"]) == (1.0, 2.0), "both, for without their folders they are one"
