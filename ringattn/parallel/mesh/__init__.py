"""The ranks: data × ring × ulysses."""
