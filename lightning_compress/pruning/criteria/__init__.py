"""What makes a weight or a channel important: one score for each criterion."""
