"""Runs as `python -m`: what the recipes on real data start from."""
