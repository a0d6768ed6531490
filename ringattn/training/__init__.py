"""The training path: data, loss, engines, checkpoints, metrics and the loop that `recipes/train.py` runs."""
