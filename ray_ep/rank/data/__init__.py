"""Training data: files -> documents -> tokens -> batches. Knows nothing of ranks, devices or torch."""
