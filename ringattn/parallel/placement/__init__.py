"""Who holds what on one ring × ulysses mesh."""
