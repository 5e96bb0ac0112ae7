"""Which part of a tensor lies in this process."""
