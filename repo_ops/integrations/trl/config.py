"""The settings of a RePOTrainer: TRL's GRPOConfig, and what replay and our objectives add."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from repo_ops.advantages import get_estimator
from repo_ops.integrations.trl.options import mapping, objective_of, refuse_unread
from repo_ops.integrations.trl.version import supported_trl
from repo_ops.replay import strategy_names

supported_trl()

from trl import GRPOConfig  # noqa: E402  (only once its version is known)

__all__ = ["RePOConfig"]

SCALES = {"group": "grpo", "none": "dr_grpo"}
"""TRL's scale_rewards -> our estimator of the same advantages."""
READABLE = frozenset({"ref_logps", "sampler_logps", "entropy"})
"""What an objective may read beside log-probabilities: all that TRL's rows hold."""


UNREAD_WITHOUT = {
    "replay": ("replay_num", "replay_capacity", "replay_min_size", "off_policy_coef"),
    "shared_rows": ("row_tokens", "head_float32"),
}
"""Setting -> those that mean nothing where it is off."""


@dataclass
class RePOConfig(GRPOConfig):
    """GRPOConfig with replay and any objective of this library.

    Without `objective` the loss is the one that TRL's options describe (loss_type, epsilon, ...). An option that the
    chosen loss does not read is an error, never ignored.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "objective_args", "advantage_args"]

    objective: str | None = field(
        default=None, metadata={"help": "An objective of repo_ops.objective_names(); None: TRL's loss_type."}
    )
    objective_args: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": "Hyper-parameters of that objective, e.g. {'eps_high': 0.28}."}
    )
    replay: str | None = field(
        default="variance",
        metadata={"help": "Replay strategy: full_scope, random, recency, reward, variance; None: no replay."},
    )
    replay_num: int = field(default=8, metadata={"help": "Samples drawn for each prompt, at most (>= 1)."})
    replay_capacity: int = field(default=32, metadata={"help": "Samples kept of each prompt, the newest."})
    replay_min_size: int = field(
        default=8, metadata={"help": "Samples that a prompt must have in the buffer before it draws (>= 1)."}
    )
    off_policy_coef: float = field(default=1.0, metadata={"help": "Weight of the replayed part of the loss (> 0)."})
    advantage_mode: str = field(
        default="split",
        metadata={"help": "Replayed samples have a mean and std of their own (split), or share the group's (mixed)."},
    )
    advantage_estimator: str | None = field(
        default=None, metadata={"help": "An estimator of repo_ops.advantages; None: TRL's, as scale_rewards says."}
    )
    advantage_args: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": "Hyper-parameters of that estimator."}
    )
    shared_rows: bool = field(
        default=True,
        metadata={
            "help": "Compute a prompt once for all its completions (needs SDPA or eager attention and whole weights); "
            "False: TRL's own padded rows, which work for whatever TRL trains."
        },
    )
    row_tokens: int = field(
        default=4096, metadata={"help": "Padded tokens of one forward over shared rows; lower needs less memory."}
    )
    head_float32: bool = field(
        default=False,
        metadata={"help": "Keep the head's products in float32 under bf16 or fp16, where TRL's and ours are rounded."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("replay_num", "replay_min_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.replay_capacity < self.replay_min_size:
            raise ValueError(
                f"replay_capacity: expected at least replay_min_size = {self.replay_min_size}, got "
                f"{self.replay_capacity}; replay would never start"
            )
        if self.row_tokens < 1:
            raise ValueError(f"row_tokens: expected at least 1, got {self.row_tokens}")
        if not self.off_policy_coef > 0:
            raise ValueError(f"off_policy_coef: expected more than 0, got {self.off_policy_coef}; or set replay=None")
        self._check_advantages()
        self._warn_of_unread()
        if not self.uses_ours:
            if self.objective_args:
                raise ValueError(
                    f"objective_args: expected none without objective, got {self.objective_args}; name one"
                )
            return
        refuse_unread(self)
        self._check_objective()
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                "steps_per_generation: expected a multiple of gradient_accumulation_steps = "
                f"{self.gradient_accumulation_steps}, got {self.steps_per_generation}; the loss of an optimizer step "
                "is divided by the counts of that step, which must lie in one generation"
            )
        if self.replay is not None:
            self._check_replay()

    @property
    def uses_ours(self) -> bool:
        """Whether any of our machinery runs; else the trainer is TRL's GRPOTrainer to the last bit."""
        return self.replay is not None or self.objective is not None or self.shared_rows

    @property
    def truncates_sampling(self) -> bool:
        """Whether completions come from another distribution than softmax(logits / temperature)."""
        return bool(
            self.top_p != 1
            or self.top_k
            or self.min_p
            or self.repetition_penalty != 1
            or self.generation_kwargs
            or self.vllm_structured_outputs_regex
        )

    @property
    def estimator(self) -> dict[str, Any]:
        """How `repo_ops.group_advantages` is called for rows that TRL gave no advantage."""
        if self.advantage_estimator is None:
            return {"mode": self.advantage_mode, "estimator": SCALES.get(self.scale_rewards, "grpo")}
        hyper = mapping("advantage_args", self.advantage_args)
        return {"mode": self.advantage_mode, "estimator": self.advantage_estimator, **hyper}

    def _warn_of_unread(self) -> None:
        """A warning, not an error: the same settings with replay and without it are a comparison that people make."""
        for reader, names in UNREAD_WITHOUT.items():
            given = [] if getattr(self, reader) else [name for name in names if getattr(self, name) != _default(name)]
            if given:
                warnings.warn(f"{', '.join(given)}: not read with {reader}={getattr(self, reader)}", stacklevel=4)

    def _check_objective(self) -> None:
        objective = objective_of(self)
        if missing := sorted(objective.reads - READABLE):
            raise ValueError(
                f"objective: expected one that reads log-probabilities and entropy, got {self.objective!r}, which also "
                f"reads {', '.join(missing)}; call repo_ops.linear_policy_loss from a loop of your own"
            )
        if "ref_logps" in objective.requires:
            raise ValueError(
                f"objective: expected one that reads a reference policy for its KL alone, got {self.objective!r}, "
                "whose loss itself needs one, of replayed completions too; call repo_ops.linear_policy_loss from a "
                "loop of your own"
            )
        if objective.reach == "batch" and self.world_size > 1:
            raise ValueError(
                f"objective: {self.objective!r} has statistics over a batch, expected one process, got "
                f"{self.world_size}; choose an objective of scope token or sequence"
            )
        self.beta = objective.beta  # TRL makes its reference model where this is not 0

    def _check_advantages(self) -> None:
        if self.advantage_mode not in ("split", "mixed"):
            raise ValueError(f"advantage_mode: expected 'split' or 'mixed', got {self.advantage_mode!r}")
        if self.advantage_estimator is not None:
            get_estimator(self.advantage_estimator, **mapping("advantage_args", self.advantage_args))
            for name in ("scale_rewards", "multi_objective_aggregation"):
                if getattr(self, name) != _default(name):
                    raise ValueError(
                        f"{name}: expected its default {_default(name)!r} with advantage_estimator, got "
                        f"{getattr(self, name)!r}; that estimator takes the weighted sum of the rewards as it is"
                    )
        elif self.advantage_args:
            raise ValueError(f"advantage_args: expected none without advantage_estimator, got {self.advantage_args}")
        if not self.uses_ours and self.advantage_estimator is not None:
            raise ValueError("advantage_estimator: expected None where TRL's own loss runs; set objective")
        if self.advantage_mode == "mixed" and self.replay is None:
            raise ValueError("advantage_mode: expected 'split' without replay, got 'mixed'")

    def _check_replay(self) -> None:
        if self.replay not in strategy_names():
            raise ValueError(f"replay: expected one of {', '.join(strategy_names())} or None, got {self.replay!r}")
        if self.truncates_sampling:
            raise ValueError(
                "replay: expected top_p=1, top_k=0, min_p=None, repetition_penalty=1, no generation_kwargs and no "
                "vllm_structured_outputs_regex; the stored log-probabilities would belong to another distribution than "
                "the learner's"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation: expected 'sum_then_normalize' with replay, got "
                f"{self.multi_objective_aggregation!r}; a stored sample keeps one reward"
            )
        if self.advantage_estimator is None and self.scale_rewards not in SCALES:
            raise ValueError(
                f"scale_rewards: expected 'group' or 'none' with replay, got {self.scale_rewards!r}; replayed samples "
                "are compared with those of their prompt"
            )


def _default(name: str) -> Any:
    return RePOConfig.__dataclass_fields__[name].default
