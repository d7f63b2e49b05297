"""The ground, which knows nothing of ours: command line, errors, files, progress, precision, processes, numerics."""
