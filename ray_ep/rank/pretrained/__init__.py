"""transformers checkpoints as they come: which files count, what is quantised, each rank's own experts."""
