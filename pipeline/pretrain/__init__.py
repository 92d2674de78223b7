"""Pretraining as the engine's task: the order of samples, their masks, the losses, the held-out figures."""
