"""Which TRL this code was written against, and whether the one at hand is it."""

from __future__ import annotations

import re
import sys
from types import ModuleType

SUPPORTED = ">=1.16,<1.17"
FIRST, BEYOND = (1, 16), (1, 17)


def supported_trl() -> ModuleType:
    """The module trl, of a version whose internals this code knows and that nobody else has rewritten.

    Raises:
        ImportError: TRL is absent, or of another version.
        RuntimeError: Unsloth has replaced its trainers.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError(f"trl: expected to be installed; pip install 'trl{SUPPORTED}'") from error
    numbers = tuple(int(number) for number in re.findall(r"\d+", trl.__version__)[:2])
    if not FIRST <= numbers < BEYOND:
        raise ImportError(
            f"trl: expected a version {SUPPORTED}, got {trl.__version__}, whose internals may differ; "
            f"pip install 'trl{SUPPORTED}', or call repo_ops.linear_policy_loss from a loop of your own"
        )
    if "unsloth" in sys.modules or trl.GRPOTrainer.__name__.startswith("Unsloth"):
        raise RuntimeError(
            "trl: expected its own trainers, got those that Unsloth compiled, which go around TRL's head and would "
            "leave ours uncalled; import TRL in a process without unsloth"
        )
    return trl
