"""Ways to store the entries of a tensor: where they are (`positions`) and what they are (`values`)."""
