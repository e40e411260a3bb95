"""Channels that each sample chooses: feature boosting and suppression, and runtime neural pruning."""

from lightning_compress.channel_gates.gates import LayerGates, gates_of
from lightning_compress.channel_gates.kinds import FeatureGate, GroupGate, Layer
from lightning_compress.channel_gates.making import give_gates, take_gates
from lightning_compress.channel_gates.network import ChannelGatedNetwork

__all__ = [
    "ChannelGatedNetwork",
    "FeatureGate",
    "GroupGate",
    "Layer",
    "LayerGates",
    "gates_of",
    "give_gates",
    "take_gates",
]
