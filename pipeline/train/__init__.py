"""Pretraining: one loop for both phases, and the parts it is made of."""
