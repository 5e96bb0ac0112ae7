"""Snapshots during the run, and what is made of them afterwards."""
