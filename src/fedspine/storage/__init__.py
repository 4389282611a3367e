"""What a run keeps on disk while it goes: its state and its records."""
