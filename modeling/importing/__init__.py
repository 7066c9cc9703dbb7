"""Foreign checkpoints made ours: what lies in a file, which architecture it is, and a checkpoint directory of it."""
