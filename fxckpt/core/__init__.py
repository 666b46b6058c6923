"""The step as data, and all that is decided about it. Nothing here needs torch."""
