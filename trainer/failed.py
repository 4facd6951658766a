"""A run that cannot go on, for a reason that fits in a few sentences."""

__all__ = ["RunFailed"]


class RunFailed(RuntimeError):  # noqa: N818
    """Training cannot go on; the message says why, where to look and what helps. The console shows it alone."""
