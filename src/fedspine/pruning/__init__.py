"""What pruning methods share: pruning and tuning on a device, scheduled rounds, deployment."""
