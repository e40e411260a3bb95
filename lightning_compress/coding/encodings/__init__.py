"""Ways to store a tensor: the positions of its nonzero entries, and their values."""
