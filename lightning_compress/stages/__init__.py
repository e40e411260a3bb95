"""A network as one graph: its stages between cuts, for any number of samples."""
