"""WHAT runs: the chain from raw text to a fine-tuned BERT, and all that runs on a compute node."""
