"""Links between ranks: which to measure, what the measurements say, and whether they still hold. Pure NumPy."""
