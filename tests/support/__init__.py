"""What tests share: starting the product's commands, made-up runs, runs sent to a real Slurm."""
