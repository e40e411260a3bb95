"""A small LightningModule that has few images learns from a big one that had many: one line around it."""

import logging

import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn, tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_compress import DistillationModule


class YourModule(LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=2e-3)


def tested(module, images, epochs):
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(images, batch_size=32, shuffle=True))
    return trainer.test(module, DataLoader(test, batch_size=400), verbose=False)[0]["test_acc"]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    train, test = random_split(TensorDataset(tensor(images / 16).float(), tensor(labels)), [1397, 400])

    few = Subset(train, range(140))
    teacher, student, alone = YourModule(width=256), YourModule(width=32), YourModule(width=32)
    best, worst = tested(teacher, train, epochs=15), tested(alone, few, epochs=100)
    # self.net(...) is what the step calls; a teacher may also be the path of YourModule's checkpoint
    module = DistillationModule(student, teacher, temperature=4.0, alpha=0.9, network="net")
    accuracy = tested(module, few, epochs=100)
    print(f"test accuracy {accuracy:.3f} with a teacher of {best:.3f}, {worst:.3f} without")
