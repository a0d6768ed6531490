"""What moves rows and heads between tensors and messages: packing, taking, adding, pulling from peers."""
