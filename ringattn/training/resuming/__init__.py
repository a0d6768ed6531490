"""What a run keeps, and what a start goes on from."""
