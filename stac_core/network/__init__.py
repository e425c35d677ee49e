"""The streaming network: everything that inference executes and nothing else."""
