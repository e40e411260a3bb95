"""A lottery ticket: 4 % of the weights learn again from their first values, beside new values on the same mask."""

import logging
from copy import deepcopy

import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import equal, nn, tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_compress import LotteryTicketCallback


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


def tested(module, *callbacks, epochs):
    seed_everything(0, verbose=False)  # the same order of the images for all
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **QUIET)
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
    return trainer.test(module, DataLoader(test, batch_size=400), verbose=False)[0]["test_acc"]


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    train, test = random_split(TensorDataset(tensor(images / 16).float(), tensor(labels)), [1397, 400])

    dense = YourModule()
    ticket, reinit = deepcopy(dense), deepcopy(dense)
    best = tested(dense, epochs=5)
    # Round 0 is dense; before each of three more the smallest weights leave, and the others go back to the start.
    settings = {"rate": None, "amount": 0.96, "rounds": 3, "rewind": "init"}
    found = tested(ticket, LotteryTicketCallback(**settings), epochs=20)
    # The control has the same rounds and so the same mask, but its last round begins with weights that are drawn anew.
    drawn = tested(reinit, LotteryTicketCallback(**settings, restart="reinit", signs="random"), epochs=20)

    pairs = zip(ticket.net[::2], reinit.net[::2], strict=True)
    assert all(equal(one.weight != 0, other.weight != 0) for one, other in pairs)
    print(f"test accuracy {found:.3f} with 4 % of the weights, {drawn:.3f} with new ones on its mask, dense {best:.3f}")
