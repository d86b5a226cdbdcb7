"""Ranks that answer requests: the engine, and what is served on top of it."""
