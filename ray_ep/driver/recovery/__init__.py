"""Survivors of a lost rank go on: what they decide, and how it is carried out."""
