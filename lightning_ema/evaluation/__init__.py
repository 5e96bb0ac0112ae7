"""Further evaluations, and the selection among averages."""
