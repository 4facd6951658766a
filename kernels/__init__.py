"""Triton kernels for the vocabulary axis and the policy terms.

`logit_rows`, `tiled_logps`; `clipped_ratio`, `group_advantages`; `launch`, `tune` and `aot` say how they run.

Importing this package imports neither torch nor triton; its modules do.
"""
