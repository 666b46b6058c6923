"""Activation checkpointing as a compiler pass."""
