"""How emitted graphs become something that runs."""
