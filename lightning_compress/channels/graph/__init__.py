"""Follow channels through the exported graph of a network, operator by operator."""
