"""A run's state and records on disk."""
