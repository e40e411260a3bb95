"""What `lightning-compress` does, as functions with plain arguments."""
