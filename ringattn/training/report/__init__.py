"""What a run tells people as it goes: progress, metrics, curves, trackers, traces."""
