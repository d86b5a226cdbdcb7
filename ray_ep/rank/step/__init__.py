"""The parts of a train step: forward, losses, optimizer, update, and what undoes a half step."""
