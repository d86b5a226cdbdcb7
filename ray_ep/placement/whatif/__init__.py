"""Clusters that do not exist: described, simulated, and what follows in one sentence. Pure NumPy."""
