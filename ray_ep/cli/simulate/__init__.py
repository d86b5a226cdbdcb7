"""`ray-ep simulate`: its options, what it is given, what it does and prints."""
