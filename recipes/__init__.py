"""Recipes: whole chains of stages as YAML files."""
