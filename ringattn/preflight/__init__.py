"""Looking at machines before a run: each node examines itself, its devices and its links; node 0 judges them."""
