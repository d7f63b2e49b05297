"""The instrument: derivatives, eigenvalues, and the curvature of a model at single examples."""
