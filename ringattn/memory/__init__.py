"""What is alive at a time in training, and where: each feature is one file, exact, and of use on any model.

`settings`: all of it as two records. `tiled_loss`: the loss of a head without its logits. `tiled_rows`: an MLP in tiles
of tokens. `layers`: what each layer keeps for its backward pass; `products` and `every` say how. `offload`: what is
kept, in host memory until it is wanted. `out_of_memory`: the report of a step that did not fit. `planning`: what a run
will hold.
"""
