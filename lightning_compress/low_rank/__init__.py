"""Layers of low rank: a weight becomes a product of thin ones."""
