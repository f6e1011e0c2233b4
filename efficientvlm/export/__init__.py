"""Checkpoints in forms that run without this package."""
