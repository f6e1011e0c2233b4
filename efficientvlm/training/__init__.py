"""One training loop, its resumable state, and what it reports."""
