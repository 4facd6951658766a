"""Objectives that are another objective with other settings: a row each, no code."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    # arXiv 2503.20783: the sum over tokens is divided by a constant, so that length is not rewarded
    "dr_grpo": ("grpo", {"reduction": "const"}),
    # arXiv 2503.14476: clip-higher, every token weighs the same
    "dapo": ("grpo", {"reduction": "token-mean", "eps_high": 0.28}),
    # TRL's and Liger's loss_type "bnpo": token mean of the local micro-batch (pass no num_items)
    "bnpo_loss_type": ("grpo", {"reduction": "token-mean"}),
}
