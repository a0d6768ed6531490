"""What is trained: a model's configuration, its first weights, its positions, and which of its weights are trained."""
