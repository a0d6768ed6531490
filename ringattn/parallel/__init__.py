"""Placement, plans and their execution over the ranks of a sequence mesh."""
