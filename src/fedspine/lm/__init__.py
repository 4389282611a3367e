import logging

# transformers imports torchao where it is installed, and these tell of kernels for GPUs that are
# not here and of what torchao calls
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
