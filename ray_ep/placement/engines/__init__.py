"""Other engines' files: routing records in, placements in and out. Documents only, no files are opened here."""
