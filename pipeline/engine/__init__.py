"""One optimizer step and the loop around it, whatever is trained; its state, checkpoints and record."""
