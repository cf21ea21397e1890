"""Fit the factors of a structure to one dense weight."""
