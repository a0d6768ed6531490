"""A run's own health: where each rank is, one monitor process a node that names what stands still or is gone, and how
the run ended.

`record`, `places`, `processes`, `stacks`, `causes`, `local_ranks` and `monitor` import nothing but the standard library
and `incidents`: the monitor starts in milliseconds and holds no memory of a device.
"""
