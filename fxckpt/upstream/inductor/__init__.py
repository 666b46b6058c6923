"""Inductor, torch's compiler: what it takes ops apart into, which it computes in one kernel, and graphs compiled by it."""
