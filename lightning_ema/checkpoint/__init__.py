"""What stands in our files."""
