"""One rank's work: model, data, optimizer, checkpoints, the train step; Ray in actor.py alone."""
