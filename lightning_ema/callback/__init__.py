"""Lightning's hooks."""
