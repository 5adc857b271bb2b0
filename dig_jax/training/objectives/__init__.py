"""Training objectives: the loss that a step minimizes."""
