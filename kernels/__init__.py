"""Triton kernels for the vocabulary axis and the policy terms: `logit_rows`, `clipped_ratio`, `group_advantages`.

Importing this package imports neither torch nor triton; its modules do.
"""
