"""Who predicts ratings best, in how many bytes: a perceptron, a dot product, or biases? A file may be named."""

import logging
import sys

from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_compress import WeightClusteringCallback, save_compressed
from lightning_compress.baselines import NNMF, DotProduct, MatrixFactorization, Ratings, RidgeBiases


def fitted(module, epochs, callbacks=()):
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "check_val_every_n_epoch": 5,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data)
    return trainer.test(module, datamodule=data, verbose=False)[0]["test_rmse"]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(0)
    if sys.argv[-1].endswith((".data", ".dat", ".csv")):  # u.data, ratings.dat or ratings.csv of MovieLens
        data = Ratings(sys.argv[-1], users=None, items=None)
    else:
        data = Ratings(users=200, items=150, count=9_000)
    data.setup()
    sizes = data.users, data.items

    perceptron = NNMF(*sizes, width=4, products=16, hidden=(24, 24))
    product = DotProduct(*sizes, width=8)
    modules = {
        "mean": RidgeBiases(*sizes, regularization=[float("inf")]),
        "biases": RidgeBiases(*sizes),
        "dot product": MatrixFactorization(
            product, optimizer="adam", lr=0.02, regularization=0.1, frequency_scaled=True, alternate=False
        ),
        # the perceptron and the latent vectors train in turns
        "perceptron": MatrixFactorization(perceptron, lr=3e-3, regularization=5.0, alternate=True),
    }
    table = Table("", "RMSE", "clustered", "bytes")
    for name, module in modules.items():
        error, small = fitted(module, epochs=200 if name == "perceptron" else 60), None
        if isinstance(module, MatrixFactorization):
            clustering = WeightClusteringCallback(16, target=["network.user*", "network.item*", "network.mlp.*"])
            small = fitted(module, epochs=60, callbacks=[clustering])
        size = save_compressed(module, f"{name}.lcz".replace(" ", "_"))
        table.add_row(name, f"{error:.3f}", "" if small is None else f"{small:.3f}", f"{size.bytes:,}")
    Console().print(table)
    print(f"test error {small:.3f} with {name} of {size.bytes:,} bytes, before that {error:.3f}")
