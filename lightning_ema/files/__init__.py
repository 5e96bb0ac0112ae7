"""Files: written whole or not at all, read without running code, named without harm to a terminal."""
