"""A thin trainer around the library. Installed as `repo_ops.trainer`."""
