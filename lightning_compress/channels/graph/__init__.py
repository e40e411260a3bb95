"""The graph of a network, read for channels: what each operator does to the dimensions of its tensors."""
