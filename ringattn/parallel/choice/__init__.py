"""Which schedule, which heads, which degrees, which mixture of them is best."""
