"""From a layout to the plans of all its parts, the same on every rank."""
