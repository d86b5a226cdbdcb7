"""Balance: of the router by its losses, and of the ranks inside a step by guests."""
