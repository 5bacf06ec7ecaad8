"""Floor 8: the verbs of the command line. Heavy imports happen inside the verbs."""
