"""Building blocks that the techniques share: plain torch, without a Trainer and without any technique."""
