"""Timing attention beside the bare kernel: workloads, contestants, measurement, report. The recipe is benchmark.py."""
