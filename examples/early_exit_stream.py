"""A stream of batches under a budget that shrinks, as that of a battery: easy samples leave the network early."""

import time

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_compress import EarlyExitHeads
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.early_exit import EarlyExitNetwork


def serve(network: EarlyExitNetwork, images: torch.Tensor, budget: float) -> tuple[torch.Tensor, list[int], float]:
    """Return the classes of a batch, how many samples left at each exit, and the milliseconds."""
    start = time.perf_counter()
    logits, exit_index = network(images, budget=budget)
    milliseconds = 1000 * (time.perf_counter() - start)
    return logits.argmax(1), exit_index.bincount(minlength=len(network.exits) + 1).tolist(), milliseconds


if __name__ == "__main__":
    seed_everything(0)
    torch.set_num_threads(1)
    data = Digits()
    module = Classifier(DigitsConvNet(), lr=3e-3, input_shape=(1, 8, 8))
    module = EarlyExitHeads(module, ["relu1", "pool1"], num_classes=10, network="network")
    trainer = Trainer(max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)

    module.calibrate(data, accuracy_drop=0.01, unit="macs")  # on the validation data
    network = module.deploy(min_gain=float("-inf"))  # every exit that the calibration opened, whatever it saves here
    rule = network.rule
    cheapest, full = rule.frontier[0][0], sum(rule.stages)

    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    battery, batches, right = 1.0, images.split(60), 0
    for some, aims in zip(batches, labels.split(60), strict=True):
        budget = max(cheapest, battery * full)  # what a sample may cost now
        found, left, milliseconds = serve(network, some, budget)
        hits = int((found == aims).sum())
        right += hits
        print(
            f"battery {battery:4.0%}: at most {budget:9,.0f} MACs per sample, left by exit {left}, "
            f"{hits / len(aims):6.1%} right, {milliseconds:5.2f} ms"
        )
        battery -= 0.9 / (len(batches) - 1)
    print(f"test accuracy {right / len(labels):.3f} with a battery that falls from 100 % to 10 %")
