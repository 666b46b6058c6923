"""Methods that people know: reference points, and what users of other tools ask for by name."""
