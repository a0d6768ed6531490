"""What is looked at while a run goes on: numbers, ranks, hardware and speed."""
