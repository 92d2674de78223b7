"""A real multi-node Slurm on one machine: ``python -m slurm.devcluster up --nodes 4``."""
