"""How a run is started: DeepSpeed JSONs (`ds/`), a hostfile, and scripts for several nodes and Slurm. Data, no code."""
