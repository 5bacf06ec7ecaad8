"""Floor 6: run a model: load it on this rank, generate, time each token. Its modules are imported one by one: some are
heavy, and the command line wants the light one early."""
