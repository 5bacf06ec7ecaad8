"""Floor 5: put a model together from a live model, from source files or from a checkpoint; save it; convert."""
