"""What the tests share: a small network with data, the registry of canonical settings, and a pair of ranks."""
