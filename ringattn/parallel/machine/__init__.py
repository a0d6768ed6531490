"""Speeds of a machine: kernel rates, links, shipped numbers, calibration."""
