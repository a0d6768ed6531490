"""Flash kernels behind one contract, and the merge of their partial results."""
