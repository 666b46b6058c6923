"""All that torch keeps to itself: its private interfaces and the patches of it have their one home here."""
