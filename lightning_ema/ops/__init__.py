"""Arithmetic on lists of tensors."""
