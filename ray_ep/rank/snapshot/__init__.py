"""Snapshots: what a rank owns, copied between steps and held a second time by a rank of another node."""
