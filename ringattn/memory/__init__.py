"""What is alive at a time in training, and where: each feature is one file, exact, and of use on any model.

`tiled_loss`: the loss of a head without its logits. `tiled_rows`: an MLP in tiles of tokens. `layers`: what each layer
keeps for its backward pass. `offload`: what is kept, in host memory until it is wanted.
"""
