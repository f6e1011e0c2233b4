"""Checkpoint folders: their files, manifests and lineage, and whose a folder is. Nothing here loads torch."""
