"""Low-curvature networks: the layers, the architectures built from them, and the selector that names them."""
