"""Losses, ramps, metrics and data of semi-supervised training."""
