"""A LightningModule that you have already: one callback more, nothing else changes."""

import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn, tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_compress import IterativePruningCallback


class YourModule(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    train, test = random_split(TensorDataset(tensor(images / 16).float(), tensor(labels)), [1437, 360])

    pruning = IterativePruningCallback(amount=0.9)  # 90 % of all weights, gradually, the last third to recover
    trainer = Trainer(max_epochs=20, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
    module = YourModule()
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
    (result,) = trainer.test(module, DataLoader(test, batch_size=360), verbose=False)
    print(f"test accuracy {result['test_acc']:.3f} with {pruning.sparsity:.0%} of the weights at zero")
