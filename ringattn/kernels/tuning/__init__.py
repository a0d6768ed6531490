"""Measuring who is fastest: backends, and tiles of FlexAttention, once for each shape, stored by machine."""
