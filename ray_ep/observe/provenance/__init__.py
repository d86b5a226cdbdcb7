"""Which expert on which rank computed for a token: records of sampled tokens kept as Parquet, read, drawn, counted."""
