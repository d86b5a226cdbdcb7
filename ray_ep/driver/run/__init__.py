"""What a run leaves on disk: its directory, the claim to it, its checkpoints. Starts no rank."""
