"""Benchmarks behind `ray-ep bench`: side by side in one run, with ratios. Not imported by anything that trains."""
