"""Slurm jobs: what a cluster is like (site), how a run lies on its nodes (layout), the job file."""
