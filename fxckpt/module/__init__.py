"""What stands in for a user's model, and plans it."""
