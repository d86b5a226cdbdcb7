"""HTTP: the paths, what their bodies may say, keys, errors, streams. Transformers' own server carries it."""
