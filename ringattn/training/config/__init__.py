"""The keys of a run's configuration: what each may hold, and what goes together, checked before anything starts."""
