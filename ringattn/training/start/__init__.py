"""How a run begins: how its ranks were started, where they meet, what they agree on, and how they refuse."""
