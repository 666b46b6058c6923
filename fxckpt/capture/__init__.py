"""Capture: a model becomes one joint graph."""
