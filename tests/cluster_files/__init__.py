"""The files of cluster/: each against the schema, the parser or the program of whoever will read it."""
