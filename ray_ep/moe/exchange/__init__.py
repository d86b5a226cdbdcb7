"""How tokens travel between ranks, on any device: dispatch and combine, the ways, and the choice among them."""
