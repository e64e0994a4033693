"""`tagllm sweep`: `points` says which runs there are, `run` trains and scores them, `summary` tells what came of them.

Each run has a folder of its own below the config's `output`; what is finished is not done again, so a sweep that was
cut off goes on when it is started again, and several processes (a Slurm array) can take a part of the runs each.
"""
