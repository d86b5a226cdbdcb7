"""`ray-ep plan`: its options, what it is given, what it does and prints."""
