"""Closed settings of every stage; nothing here imports torch or transformers."""
