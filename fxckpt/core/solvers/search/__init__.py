"""Local search in schedules, with an exact account of bytes while they are edited."""
