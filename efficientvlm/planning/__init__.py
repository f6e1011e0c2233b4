"""What a chain of stages would make and cost, and whatever is wrong with it, before anything is trained."""
