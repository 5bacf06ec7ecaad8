"""Floor 7: measure kernels and whole steps, beside a peer's on the same machine. Its modules are imported one by one.

A number of one line is the median of runs that alternate with reads of memory and with every other line of the same
shape: on shared machines the bandwidth itself wanders within minutes, so only what was measured together compares.
"""
