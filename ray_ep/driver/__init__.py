"""The driver of a run: cluster, step loop, run directory, alarms. Above the ranks, below the observers."""
