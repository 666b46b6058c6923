"""Dynamic programming over a chain of segments, with choices from minimum cuts."""
