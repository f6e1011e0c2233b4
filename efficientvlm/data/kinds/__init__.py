"""What a sample is: a file a kind."""
