"""This library under TRL's trainers: `install()` for the head of all of them, `RePOTrainer` for replay with GRPO.

    from repo_ops.integrations.trl import install
    install()

Needs TRL 1.16 (`pip install 'trl>=1.16,<1.17'`).
"""

from typing import TYPE_CHECKING, Any

from repo_ops.integrations.trl.head import Installed, install, uninstall
from repo_ops.integrations.trl.version import supported_trl

if TYPE_CHECKING:
    from repo_ops.integrations.trl.config import RePOConfig
    from repo_ops.integrations.trl.trainer import RePOTrainer

__all__ = ["Installed", "RePOConfig", "RePOTrainer", "install", "uninstall"]


def __getattr__(name: str) -> Any:
    # classes of TRL's own: they can only be made once TRL is there, and importing it takes seconds
    if name in ("RePOConfig", "RePOTrainer"):
        supported_trl()
    if name == "RePOConfig":
        from repo_ops.integrations.trl.config import RePOConfig

        return RePOConfig
    if name == "RePOTrainer":
        from repo_ops.integrations.trl.trainer import RePOTrainer

        return RePOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
