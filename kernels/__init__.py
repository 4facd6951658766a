"""Triton kernels and their host wrappers. Installed as `repo_ops.kernels`."""
