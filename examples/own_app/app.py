"""A Hydra app of your own. Data, Trainer and techniques come from lightning_compress: see config.yaml beside it.

python app.py callbacks.iterative_pruning.amount=0.9
python app.py -m compress=iterative_pruning,none seed=0,1
"""

import hydra
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from lightning_compress import footprint


class YourModule(LightningModule):
    def __init__(self, width, lr):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    seed_everything(cfg.seed)
    data, module = instantiate(cfg.data), YourModule(**cfg.model)
    callbacks = [instantiate(callback) for callback in cfg.get("callbacks", {}).values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    (result,) = trainer.test(module, data, verbose=False)
    costs = footprint(module, torch.zeros(64, 1, 8, 8))
    print(
        f"test accuracy {result['test_acc']:.3f}, {costs.nonzero:,} of {costs.parameters:,} parameters, "
        f"{costs.bytes:,} bytes"
    )


if __name__ == "__main__":
    main()
