"""Rewrite: a schedule becomes a forward and a backward graph."""
