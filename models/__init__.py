"""Layers, networks by name, weight files, conversion, the bound of Theorem 1."""
