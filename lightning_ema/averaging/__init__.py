"""The engine; torch only."""
