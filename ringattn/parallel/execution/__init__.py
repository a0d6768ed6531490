"""Walking a plan: stages, transfers of keys, exchanges of heads, sums."""
