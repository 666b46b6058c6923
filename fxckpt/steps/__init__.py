"""Real steps: run, measured, compared with each other."""
