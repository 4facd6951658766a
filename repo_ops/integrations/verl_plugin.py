"""Imported by verl in every process (entry-point group `verl.plugins`): registers what REPO_OPS_VERL asks for.

verl imports plugins and does not call them, so importing this module is what registers. Default "objectives"; "head"
too, as in REPO_OPS_VERL=objectives,head, also replaces verl's fused kernel; "none" does nothing. verl swallows what a
plugin raises (it logs at DEBUG), so a failure is logged here at ERROR before it is raised.
"""

from __future__ import annotations

import logging
import os

from repo_ops.integrations import verl

ACTIONS = {"objectives": verl.register, "head": verl.install_head}


def _run(wanted: str) -> None:
    names = [name.strip() for name in wanted.split(",") if name.strip() not in ("", "none")]
    if unknown := [name for name in names if name not in ACTIONS]:
        raise ValueError(f"REPO_OPS_VERL: expected {', '.join(ACTIONS)} or none, got {', '.join(unknown)}")
    for name in names:
        ACTIONS[name]()


try:
    _run(os.environ.get("REPO_OPS_VERL", "objectives"))
except Exception:
    logging.getLogger(__name__).exception("repo_ops: nothing, or not everything, was installed into verl")
    raise
