"""Tasks and their rows, the characters that define correctness, and how both become tokens."""
