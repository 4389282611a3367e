"""The state and the records of a run on disk."""
