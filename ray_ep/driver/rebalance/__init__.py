"""Rebalancing while a job steps: what recent steps say, whether a move pays, and the move."""
