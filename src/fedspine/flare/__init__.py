"""A fleet of real machines over NVIDIA FLARE: the server's session and the sites' side."""
