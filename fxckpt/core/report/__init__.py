"""Report: a plan becomes text and pictures."""
