"""Real text to try the product with: a tool, no stage of the chain."""
