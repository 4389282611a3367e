"""Serving asks and scoring models: here, in worker processes, or in one batched pass."""
