"""The vocabulary axis: from hidden states and head weight to row statistics and back, one tile of logits at a time."""
