"""What is read from Lightning."""
