"""Floor 0: errors, settings, rank discovery and logging. Imports nothing of dist_lowbit."""
