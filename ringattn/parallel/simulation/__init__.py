"""All ranks of a step in one process."""
