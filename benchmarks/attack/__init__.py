"""What `benchmarks/hostile.py` is made of: sound inputs, damage, processes that may be killed, and a judge."""
