"""Raw text to verified HDF5 shards; imports no torch, no Slurm and nothing of the pipeline."""
