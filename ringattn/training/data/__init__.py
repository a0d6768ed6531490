"""The documents of a run: which files, what they hold, their tokens, and how far reading them is."""
