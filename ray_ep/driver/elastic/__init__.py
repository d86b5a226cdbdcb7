"""Ranks that come and go while a run steps on."""
