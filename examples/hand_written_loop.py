"""Without Lightning: the same functions in a training loop of your own."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_compress import save_compressed
from lightning_compress.core.projection import Projection
from lightning_compress.core.schedule import amount_at
from lightning_compress.core.select import select_parameters
from lightning_compress.pruning.masks import prune_weights

STEPS, RAMP, EVERY, BATCH = 900, 600, 50, 32

if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = torch.tensor(images / 16).float()[order], torch.tensor(labels)[order]
    train_x, train_y, test_x, test_y = x[:1437], y[:1437], x[1437:], y[1437:]

    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    weights = select_parameters(net)  # the weight of every linear layer and convolution
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}

    def apply_masks(tensors):
        for name, tensor in tensors.items():
            tensor.mul_(masks[name])

    projection = Projection(weights, apply_masks, keep_latent=False)
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(train_y), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(net(train_x[batch]), train_y[batch]).backward()
        projection.open()
        optimizer.step()
        projection.close()  # momentum has moved the masked weights: they are zero again
        if step % EVERY == 0 and step <= RAMP:
            amount = amount_at(step / RAMP, 0.9, schedule="cubic")
            scores = {name: weight.detach() for name, weight in weights.items()}
            masks = prune_weights(scores, amount, absolute=True, alive=masks)
            projection.project()

    accuracy = (net(test_x).argmax(1) == test_y).float().mean()
    left = sum(int(weight.count_nonzero()) for weight in weights.values())
    size = save_compressed(net, "digits.lcz").bytes
    print(f"test accuracy {accuracy:.3f} with {left:,} weights left; digits.lcz has {size:,} bytes")
