"""Exact methods, for small graphs and for tests of all others."""
