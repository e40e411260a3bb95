"""What every technique is built from: plain torch, no Trainer, no technique."""
