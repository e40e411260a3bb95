"""The ways to run a network in a report: exits and budgets, beside networks trained alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from support.ranks import RankPair
from support.small import quiet_trainer

from lightning_compress import EarlyExitHeads, SlimmableWidth, load_compressed
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.early_exit.heads import heads_of
from lightning_compress.report import Report, points_table, report_figure, report_markdown
from lightning_compress.tasks.run import Run


def classifier(width: int = 4) -> Classifier:
    return Classifier(DigitsConvNet(width=width), lr=3e-3, input_shape=(1, 8, 8))


def with_exits(module: LightningModule) -> LightningModule:
    return EarlyExitHeads(module, ["pool1"], num_classes=10, network="network")


def fitted(folder: Path, **options: Any) -> Report | None:
    seed_everything(0)
    make_trainer = partial(quiet_trainer, max_epochs=1, limit_train_batches=20, **options)
    settings: dict[str, Any] = {"budget": 0.7, "unit": "share"}
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=folder, repeats=2, calibration=settings)
    return job.run(
        [classifier()],
        callbacks=[],
        wrap=with_exits,
        dense={"max_epochs": 1},
        controls={"narrow": classifier(2)},
    )


def test_a_run_reports_each_way_by_the_modules_own_test(tmp_path: Path) -> None:
    report = fitted(tmp_path)
    assert report is not None
    points = {(point.kind, point.name): point for point in report.points}
    names = [name for kind, name in points if kind == "point"]
    assert names[0] == "exit 1"
    assert names[-2:] == ["calibrated", "compressed"]
    assert ("control", "narrow") in points
    assert points["dense", "dense"].test_metric == report.dense.test_metric
    assert points["point", "compressed"].test_metric == report.compressed.test_metric
    assert Report.load(tmp_path / "report.json").points == report.points
    assert "narrow (trained alone)" in report_markdown(report)
    assert len(points_table(report).rows) == len(report.points)
    assert points["point", "exit 1"].file_bytes is None, "it is in the file of the compressed network"
    small = (tmp_path / "compressed.lcz").stat().st_size
    assert points["point", "compressed"].file_bytes == report.compressed.file_bytes == small
    assert points["dense", "dense"].file_bytes == report.dense.file_bytes
    alone = points["control", "narrow"].file_bytes
    assert alone is not None
    assert 4 * sum(one.numel() for one in DigitsConvNet(width=2).parameters()) * 0.8 < alone < small
    assert (
        f"one file of {small:,} bytes for all ways to run it; the file of what was trained alone has {alone:,.0f}"
        in report_markdown(report)
    )

    assert report_figure(report).axes[-1].get_xlabel() == "latency of a batch (ms)"

    # The file has heads and thresholds, by which a plain loop finds the same accuracy.
    plain: Any = load_compressed(tmp_path / "compressed.lcz", classifier())
    module = EarlyExitHeads(plain, None, num_classes=10, network="network")
    heads = heads_of(module.network)  # type: ignore[arg-type]
    assert heads is not None
    assert heads.rule is not None
    assert heads.rule.thresholds[0] < 1.0
    data = Digits()
    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    for name, options in (("exit 1", {"exit": 1}), ("calibrated", {})):
        logits, _ = module.deploy(example_inputs=images[:4])(images, **options)
        hits = float((logits.argmax(1) == labels).float().mean())
        assert points["point", name].test_metric == pytest.approx(hits)


def test_a_way_costs_what_it_runs(tmp_path: Path) -> None:
    report = fitted(tmp_path)
    assert report is not None
    macs = {point.name: point.macs for point in report.points}
    conv1, conv2 = 4 * 9 * 64, 4 * 4 * 9 * 64
    assert macs["exit 1"] == conv1 + conv2 + 10 * 4 * 16  # the head reads 4 x 4 positions
    assert macs["exit 1"] <= macs["calibrated"] <= macs["compressed"] + 640


def ranks(folder: str) -> list[Any]:
    report = fitted(Path(folder), strategy="ddp", devices=2)
    return [] if report is None else [point.name for point in report.points]


def test_two_ranks_report_the_same_ways(rank_pair: RankPair, tmp_path: Path) -> None:
    found = rank_pair.run("tasks.test_points:ranks", tmp_path, folder=str(tmp_path / "run"))
    assert found[0][:2] == ["dense", "exit 1"]
    assert found[1] == []


def test_exits_inside_widths_are_calibrated_and_are_points_at_every_width(tmp_path: Path) -> None:
    job = Run(
        datamodule=Digits(),
        make_trainer=partial(quiet_trainer, max_epochs=1, limit_train_batches=20),
        folder=tmp_path,
        repeats=1,
        calibration={"budget": 0.7, "unit": "share"},
    )

    def wrap(module: LightningModule) -> LightningModule:
        return SlimmableWidth(with_exits(module), [0.5, 1.0], network="network")

    seed_everything(0)
    report = job.run([classifier()], callbacks=[], wrap=wrap, dense={"max_epochs": 1})
    assert report is not None
    macs = {point.name: point.macs for point in report.points}
    ways = {f"width {width}, {way}" for width in ("0.5", "1") for way in ("exit 1", "calibrated")}
    assert {"width 0.5", *ways, "compressed"} <= macs.keys()
    assert macs["width 0.5, exit 1"] == 2 * 9 * 64 + 2 * 2 * 9 * 64 + 10 * 2 * 16
    assert macs["width 1, exit 1"] <= macs["width 1, calibrated"]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"budget": 0.5, "epochs": 1}, "Classifier was not: leave search out, or add compress=slimmable"),
        ({"epochs": 1}, "needs a budget"),
        ({"budget": 0.5}, "and epochs"),
    ],
)
def test_a_search_that_can_not_be_is_refused_before_the_compression(
    tmp_path: Path, search: dict[str, Any], message: str
) -> None:
    make_trainer = partial(quiet_trainer, max_epochs=1, limit_train_batches=1)
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=tmp_path, search=search)
    with pytest.raises(ValueError, match=message):
        job.run([classifier()], callbacks=[], dense={"max_epochs": 1})


def test_a_calibration_of_nothing_is_refused(tmp_path: Path) -> None:
    job = Run(
        datamodule=Digits(),
        make_trainer=partial(quiet_trainer, max_epochs=1, limit_train_batches=1),
        folder=tmp_path,
        calibration={"budget": 1.0},
    )
    with pytest.raises(ValueError, match="Classifier has none: leave calibration out"):
        job.run([classifier()], callbacks=[], dense={"max_epochs": 1})
