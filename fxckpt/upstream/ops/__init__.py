"""Operators of our own, which captured and emitted graphs call."""
