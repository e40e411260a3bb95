import torch.nn.functional as F
from torch import nn


def fitnet_loss(s, t):
    return F.mse_loss(s, t)


def attention_transfer_loss(s, t):
    q = lambda a: F.normalize(a.square().sum(1).flatten(1))
    return (q(s) - q(t)).square().sum(1).mean()


def regressor(s, t, *, channel_dim=None):
    return nn.Linear(s[-1], t[-1]) if len(s) == 2 else nn.Conv1d(s[1], t[1], 1)
