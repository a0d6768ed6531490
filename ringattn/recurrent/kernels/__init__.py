"""Kernels of recurrences behind one contract."""
