"""The `evlm` command line."""
