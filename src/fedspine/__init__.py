"""Federated fine-tuning and structured pruning of language models for devices that are not alike."""

__version__ = "0.1.0"
