"""The decay as a function of the step."""
