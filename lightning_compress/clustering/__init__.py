"""Weight clustering: all weights of a layer take one of a few shared values. These functions need no Trainer."""

from __future__ import annotations

from lightning_compress.clustering.kmeans import assign, kmeans
from lightning_compress.clustering.shared_weights import Clustered, SharedWeights, cluster_weights, compression_rate

__all__ = ["Clustered", "SharedWeights", "assign", "cluster_weights", "compression_rate", "kmeans"]
