"""Ranges, blocks and tables of blocks: integers."""
