"""Experts in transformers' models: found, and the one family whose blocks are not as the others'."""
