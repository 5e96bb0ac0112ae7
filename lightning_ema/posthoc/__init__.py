"""Snapshots during the run, and what is made of them afterwards: any other average, and which one to take."""

from lightning_ema.posthoc.snapshots import Snapshots, take, write
from lightning_ema.posthoc.synthesis import Synthesis, synthesize

__all__ = ["Snapshots", "Synthesis", "synthesize", "take", "write"]
