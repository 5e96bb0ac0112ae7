"""Averages in other systems' files: what a file holds, and the same as plain weights or as a Lightning checkpoint."""

from lightning_ema.interop.convert import READERS, as_checkpoint, describe, read, recognise, write
from lightning_ema.interop.export import export_average
from lightning_ema.interop.imported import Imported

__all__ = ["READERS", "Imported", "as_checkpoint", "describe", "export_average", "read", "recognise", "write"]
