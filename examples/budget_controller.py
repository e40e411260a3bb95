"""A stream whose budget steps while others load the machine: one network runs at the width and exit that fit."""

import os
import subprocess
import sys
from collections import Counter
from statistics import mean, median

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_compress import BudgetController, EarlyExitHeads, SlimmableWidth
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.report.figure import BLUE, ORANGE, new_figure
from lightning_compress.serving import measured_settings


def serve(controller: BudgetController, batches: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> int:
    """Serve so many batches, print how that went, and return how many samples were right."""
    right = sum(int((controller(x).argmax(1) == y).sum()) for x, y in (batches * count)[:count])
    done = list(controller.history)[-count:]
    used = ", ".join(f"{name} {n}" for name, n in Counter(one.setting for one in done).most_common())
    print(
        f"budget {done[-1].budget_ms:6.2f} ms, {median(one.ms for one in done):6.2f} ms taken, kept by "
        f"{mean(one.ms <= one.budget_ms for one in done):4.0%}, load {done[-1].load:4.2f}, "
        f"{right / len(batches[0][0]) / count:6.1%} right; {used}"
    )
    return right


def plot(controller: BudgetController) -> None:
    figure = new_figure(9, 5)
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot([one.ms for one in controller.history], color=BLUE, linewidth=0.8)
    upper.plot([one.budget_ms for one in controller.history], color=ORANGE)
    upper.set(ylabel="ms per batch, and the budget", yscale="log")
    lower.plot([100 * one.accuracy for one in controller.history], color=BLUE)
    lower.set(ylabel="accuracy of the setting (%)", xlabel="batch")
    figure.savefig("budget_controller.png")


if __name__ == "__main__":
    seed_everything(0)
    torch.set_num_threads(1)
    data = Digits()
    module = Classifier(DigitsConvNet(width=64), lr=3e-3, input_shape=(1, 8, 8))
    module = EarlyExitHeads(module, ["relu1"], num_classes=10, network="network")
    module = SlimmableWidth(module, (0.0625, 0.25, 1.0), network="network")
    trainer = Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)

    points = {one.name: one.network.eval() for one in module.operating_points()}
    points["width 1"] = module.extract(1.0).eval()
    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    batches = list(zip(images.split(120), labels.split(120), strict=True))
    controller = BudgetController(measured_settings(points, data.val_dataloader()), images[:120])
    times = {one.name: 1000 * controller.table[one.name][120] for one in controller.settings}  # the fastest first
    print("\n".join(f"{one.name:>21}: {times[one.name]:6.2f} ms, {one.accuracy:.1%}" for one in controller.settings))

    right = 0
    for share in (1.5, 0.6, 0.3, 1.5):
        controller.budget_ms = max(share * max(times.values()), 1.2 * min(times.values()))
        right += serve(controller, batches, 30)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        right += serve(controller, batches, 60)
    finally:
        for other in others:
            other.kill()
            other.wait()
    right += serve(controller, batches, 60)
    if "--plot" in sys.argv:
        plot(controller)
    print(f"test accuracy {right / (240 * 120):.3f} with a budget that steps and a load that comes and goes")
