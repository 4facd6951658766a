"""Every setting of a training run: one frozen dataclass, read from YAML and the command line, checked at once."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from repo_ops.trainer.rollout.load import check_engine_args
from repo_ops.trainer.trackers import tracker_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["PolicySettings", "TrainConfig", "learning_rate", "parse_config", "parse_settings", "save_config"]

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class PolicySettings:
    """What training and evaluation are told alike: which model, how its prompts, samples and rewards are made."""

    model: str = "smollm2"
    """"smollm2", "tiny" (made on the spot), a folder in Hugging Face format, or a hub id."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Options of the task, e.g. --task_args.digits 2."""
    data_args: dict[str, Any] = field(default_factory=dict)
    """For datasets.load_dataset, e.g. --data_args.name main, --data_args.split train[:90%]."""
    prompt_column: str = "prompt"
    """Column of the data with the prompt: text, or chat messages for the tokenizer's chat template. All other columns
    reach the reward functions."""
    answer_column: str = "answer"
    """Column of the data that reaches the reward functions as `answer`."""
    chat: bool = False
    """Text prompts of the data become one user message in the tokenizer's chat template."""
    max_prompt_tokens: int | None = None
    """Longer prompts of the data are left out, and counted (none: no limit)."""
    reward: str | None = None
    """exact_match, number_match, prefix_match, math_verify, module:function, file.py:function (none: the task's)."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Several rewards with their weights, e.g. --rewards.exact_match 1 --rewards.soft_overlong 0.5; names with a dot
    in YAML or as --rewards '{"mine.py:f": 1}'. The first one decides what counts as solved."""
    reward_timeout: float | None = 300.0
    """Seconds that module:function and file.py:function may take for the completions of a step or an evaluation; the
    function runs in a process of its own that is killed then, and all goes on without these samples (none: in the
    trainer's own process, where a hang hangs the run)."""
    eval_success: float = 1.0
    """Least value of the (first) reward that counts as solved in pass@k and greedy_accuracy."""
    temperature: float = 1.0
    """Divides the logits, when sampling and in the loss (> 0)."""
    top_k: int = 0
    """Sample among the k most probable tokens only (0: all; at most 512); with replay it must be 0."""
    top_p: float = 1.0
    """Of these, sample among the most probable ones that reach this probability, in (0, 1]; below 1 it wants a top_k;
    with replay it must be 1."""
    max_new_tokens: int | None = None
    """Longest completion, tokens (none: the task's own; 256 for data)."""
    stop: list[str] | None = None
    """Single characters that end a completion, besides the end-of-sequence token (none: the task's own; no character
    for data)."""
    seed: int = 0
    """Seeds the choice and order of prompts, sampling and replay; the same seed gives the same metrics."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and of AdamW's state; bfloat16 weights often do not move at RL's learning rates."""
    autocast: bool = True
    """Compute the layers below the head in bfloat16; weights and loss stay in dtype, and the head unless
    head_autocast."""
    device: str | None = None
    """cpu, cuda, cuda:1... (none: a GPU where torch sees one, else the CPU)."""
    threads: int | None = None
    """CPU threads of torch (none: its own choice)."""


@dataclass(frozen=True)
class TrainConfig(PolicySettings):
    """One training run. The defaults train SmolLM2-135M with GRPO on a laptop."""

    task: str = "products"
    """Name of a task: products, chain_sum, lcm, gcd, count_bits, letter_counting..."""
    data: str | None = None
    """Prompts to train on, instead of a task: a .jsonl or .parquet file, a folder, or a data set of the hub."""
    eval_data: str | list[str] | None = None
    """Prompts to evaluate on, likewise; one, or a list, each of which is also reported by itself."""
    eval_data_args: dict[str, Any] = field(default_factory=dict)
    """For datasets.load_dataset, e.g. --eval_data_args.split test."""
    output_dir: str = "runs/train"
    """Folder for metrics.jsonl, config.yaml, report.png and the trained model; made if absent."""

    objective: str = "grpo"
    """Policy objective, one of repo_ops.objective_names(): grpo, dapo, cispo, gspo, ..., or repo (for replay)."""
    objective_args: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the objective, e.g. --objective_args.eps_high 0.28."""
    beta: float | None = None
    """Weight of the KL to the starting model (>= 0; usual 0 to 0.04); above 0 a frozen copy of the model is kept.
    None: the objective's own, which is 0 for most."""
    advantage_estimator: str = "grpo"
    """How rewards of a group become advantages: grpo (mean and std), dr_grpo (mean only)..."""
    advantage_args: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of that estimator."""
    advantage_mode: Literal["split", "mixed"] = "split"
    """Replayed rows have a mean and std of their own (split), or share the group's (mixed)."""
    divergence_top_k: int = 20
    """Likeliest tokens that the sampler reports at each place, where the objective reads them (dppo_topk); >= 1."""

    replay: str | None = None
    """Replay strategy: full_scope, random, recency, reward, variance (none: nothing is stored or replayed)."""
    replay_num: int = 8
    """Rows drawn from the buffer for each prompt (>= 1; full_scope draws all)."""
    replay_capacity: int = 32
    """Samples that the buffer keeps for each prompt, the newest (>= replay_min_size)."""
    replay_min_size: int = 8
    """Samples that a prompt must have in the buffer before it draws (>= 1)."""
    off_policy_coef: float = 1.0
    """Weight c of the replayed part of the loss (> 0; usual 1)."""

    steps: int = 30
    """Optimizer steps, each on freshly generated completions."""
    prompts_per_step: int = 8
    """Prompts of a step."""
    group_size: int = 8
    """Completions generated for each prompt (>= 2)."""
    train_size: int | None = None
    """Prompts in the training pool; they come round again, which is what replay feeds on (none: 32 of a task, all of
    the data)."""
    heldout_size: int | None = None
    """Prompts that are never trained on; 0: no evaluation (none: 16 of a task, all of eval_data, 0 of the data)."""
    heldout_samples: int = 8
    """Sampled completions for each held-out prompt; one greedy completion comes on top."""
    eval_k: list[int] = field(default_factory=list)
    """pass@k is reported for these k, from 1 to heldout_samples (none: 1 and heldout_samples)."""
    dynamic_sampling_max_rounds: int = 1
    """Batches of prompts that a step may generate until prompts_per_step groups have different rewards, as in DAPO;
    further groups are left out, dead ones fill up what is missing (1: no dynamic sampling)."""
    drop_dead_groups: bool = False
    """Groups whose rewards are all alike do not count in what the loss divides by (nor in its KL and entropy terms)."""
    eval_steps: int = 0
    """Evaluate every so many steps besides before and after (0: only before and after)."""
    log_steps: int = 1
    """Print every so many steps where there is no terminal; metrics.jsonl gets all of them."""
    sample_steps: int = 10
    """Show some completions with their rewards and advantages every so many steps and after the last (0: never)."""
    sample_rows: int = 4
    """Completions that are shown each time (>= 1); samples.jsonl keeps them for report.html."""
    save_completions: bool = False
    """Write every completion of every step to output_dir/completions/step_N.parquet (needs pyarrow)."""
    report_to: list[str] | str = field(default_factory=list)
    """Trackers that get every metric too: tensorboard, wandb, trackio; one, or several as tensorboard,wandb."""
    project: str = "repo-ops"
    """Project of the run in wandb and trackio; the run is named after output_dir."""
    nonfinite_limit: int = 3
    """Stop after so many steps in a row whose loss or gradient was not finite (>= 1); each is skipped and dumped."""
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch.profiler records, e.g. [3,5]; the trace lies in output_dir/profile."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """What samples: transformers, vLLM in this process, or a vLLM server; vLLM is sent the weights after each step."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """With vllm: arguments of vllm.LLM, e.g. --engine_args.max_model_len 2048. With vllm_server: url, timeout,
    sync_timeout, retries, connections, weights_dir."""

    lr: float = 5e-6
    """Peak learning rate of AdamW (usual 1e-6 to 1e-5 for a whole model)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay (>= 0)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors, each in [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm (> 0; inf: only measured)."""
    micro_batch_tokens: int = 4096
    """Padded tokens of one forward and backward; lower needs less memory and changes nothing else."""
    head_autocast: bool = False
    """Round operands of a float32 head's products to bfloat16, too; logits, sums and gradients stay float32. Several
    times the speed of those products on a GPU (with torch 2.10 or newer)."""

    replicas: int = 1
    """Whole copies of the model over all ranks that torchrun started, each sharded over ranks / replicas neighbours
    (nodes: hybrid sharding); with one rank there is nothing to shard."""
    cpu_offload: bool = False
    """Sharded parameters, gradients and AdamW's state live in the CPU's memory; needs more ranks than one."""
    recompute_layers: bool = False
    """Activation checkpointing: layers are computed again in the backward; a third more time for less memory."""
    lora_rank: int = 0
    """Rank of LoRA adapters; only they are trained, and merged into the exported model (0: the whole model is)."""
    lora_alpha: float | None = None
    """Adapters are scaled by lora_alpha / lora_rank (> 0; none: 2 * lora_rank)."""
    lora_targets: list[str] | str = "all-linear"
    """Layers that get an adapter, e.g. [q_proj,v_proj,lm_head]; all-linear: all linear layers but the head."""
    liger: bool | None = None
    """liger-kernel's RMSNorm, RoPE and SwiGLU in the layers (none: on a GPU, where it is installed)."""
    save_model: bool = True
    """Write the trained model to output_dir/model; push_to_hub writes it in any case."""
    push_to_hub: str | None = None
    """Upload the trained model to this Hugging Face repository, organisation/name; made private if it is not there."""

    save_steps: int | None = 0
    """Write a checkpoint to output_dir/checkpoints every so many steps and after the last (0: only when SIGTERM or
    Ctrl-C asks the run to stop, which then ends with status 0; none: never, and such signals end it at once)."""
    keep_last: int = 2
    """Checkpoints that are kept, the newest (>= 1)."""
    save_async: bool = False
    """Copy the state and write the checkpoint while training goes on; takes that memory once more."""
    resume: str | None = None
    """auto: go on from the newest whole checkpoint in output_dir, or begin where there is none; or a checkpoint's
    folder (none: a new run, which refuses a folder with checkpoints)."""

    @property
    def advantages(self) -> dict[str, Any]:
        """How `repo_ops.group_advantages` is to be called."""
        return {"estimator": self.advantage_estimator, "mode": self.advantage_mode, **self.advantage_args}

    @property
    def eval_sets(self) -> list[str]:
        """`eval_data` as a list."""
        return [self.eval_data] if isinstance(self.eval_data, str) else list(self.eval_data or [])

    @property
    def reward_weights(self) -> dict[str, float]:
        """Name -> weight of the rewards asked for; {} where that is left to the task."""
        return dict(self.rewards) if self.reward is None else {self.reward: 1.0}

    @property
    def pass_at(self) -> list[int]:
        """The k of pass@k."""
        return sorted(set(self.eval_k or [1, self.heldout_samples]))

    @property
    def idle(self) -> list[str]:
        """Settings that play no part because nothing is replayed. Not refused: switching replay off is one key."""
        return [] if self.replay else [name for name in _OF_REPLAY if getattr(self, name) != _default(name)]

    def __post_init__(self) -> None:
        for least, names in _AT_LEAST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and value >= least):
                    raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("temperature", "max_grad_norm", "off_policy_coef"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if self.warmup > self.steps:
            raise ValueError(f"warmup: expected at most steps = {self.steps}, got {self.warmup}")
        train_size = 32 if self.train_size is None and self.data is None else self.train_size
        if train_size is not None and self.prompts_per_step > train_size:
            raise ValueError(
                f"prompts_per_step: expected at most train_size = {train_size}, got {self.prompts_per_step}; "
                "a step would hold a prompt twice"
            )
        self._check_company()
        self._check_rewards()
        check_engine_args(self.engine, self.engine_args)
        if self.top_k > MAX_KEPT or (self.top_p < 1 and not self.top_k):
            raise ValueError(
                f"top_k, top_p: expected 0 and 1, or a top_k up to {MAX_KEPT}, got {self.top_k} and {self.top_p}; the "
                "policy's log-probabilities are taken over the tokens that were kept"
            )
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha: expected more than 0, got {self.lora_alpha}")
        if "beta" in self.objective_args:
            raise ValueError("objective_args: beta has a key of its own; write --beta instead")
        tracker_names(self.report_to)
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1] <= self.steps:
            raise ValueError(
                f"profile_steps: expected 1 <= first <= last <= steps = {self.steps}, got {list(self.profile_steps)}"
            )
        if self.replay is not None:
            self._check_replay()

    def _check_company(self) -> None:
        """Refuses what would be ignored."""
        if self.data is not None and (self.task != _default("task") or self.task_args):
            raise ValueError(f"task: expected none with data, got {self.task!r} {self.task_args}; drop one of the two")
        for needed, names in _ONLY_WITH.items():
            for name in names:
                if not getattr(self, needed) and getattr(self, name) != _default(name):
                    raise ValueError(
                        f"{name}: expected nothing without {needed}, got {getattr(self, name)!r}; add --{needed}"
                    )
        if self.head_autocast and self.dtype != "float32":
            raise ValueError(
                f"head_autocast: expected nothing with dtype {self.dtype}, whose head is rounded, got True; "
                "leave it out"
            )
        for name in ("keep_last", "save_async"):
            if self.save_steps is None and getattr(self, name) != _default(name):
                raise ValueError(f"{name}: expected nothing without checkpoints, got {getattr(self, name)!r}")
        if self.eval_steps and (self.heldout_size == 0 or (self.data and not self.eval_data and not self.heldout_size)):
            raise ValueError(
                f"eval_steps: expected held-out prompts beside it, got none and {self.eval_steps}; set heldout_size"
                + (" or eval_data" if self.data else "")
            )

    def _check_rewards(self) -> None:
        if self.reward is not None and self.rewards:
            raise ValueError(f"reward: expected none with rewards, got {self.reward!r}; name it there, with its weight")
        if not all(math.isfinite(weight) for weight in self.rewards.values()):
            raise ValueError(f"rewards: expected finite weights, got {self.rewards}")
        if self.data is not None and not self.reward_weights:
            raise ValueError("reward: expected one with data, got none; for example --reward exact_match")
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(f"reward_timeout: expected more than 0, got {self.reward_timeout}")
        if not all(1 <= k <= self.heldout_samples for k in self.pass_at):
            raise ValueError(
                f"eval_k: expected numbers from 1 to heldout_samples = {self.heldout_samples}, got {self.eval_k}"
            )

    def _check_replay(self) -> None:
        if self.top_k != 0 or self.top_p != 1:
            raise ValueError(
                f"top_k, top_p: expected 0 and 1 with replay, got {self.top_k} and {self.top_p}; the stored "
                "log-probabilities would belong to another distribution than the learner's"
            )
        if self.replay_capacity < self.replay_min_size:
            raise ValueError(
                f"replay_capacity: expected at least replay_min_size = {self.replay_min_size}, "
                f"got {self.replay_capacity}; replay would never start"
            )


def _default(name: str) -> Any:
    """The value of a setting that nobody has set."""
    found = next(each for each in fields(TrainConfig) if each.name == name)
    return found.default_factory() if callable(found.default_factory) else found.default


# of repo_ops.head.support.MAX_SUPPORT, which would import torch
MAX_KEPT = 512

_ONLY_WITH = {
    "data": ("data_args", "eval_data", "prompt_column", "answer_column", "chat", "max_prompt_tokens"),
    "eval_data": ("eval_data_args",),
    "lora_rank": ("lora_alpha", "lora_targets"),
    "report_to": ("project",),
    "autocast": ("head_autocast",),
    "sample_steps": ("sample_rows",),
}
"""Setting -> those that mean nothing without it."""
_OF_REPLAY = ("replay_num", "replay_capacity", "replay_min_size", "off_policy_coef", "advantage_mode")

_AT_LEAST = {
    0: (
        *("beta", "lr", "weight_decay", "warmup", "top_k", "lora_rank"),
        *("heldout_size", "eval_steps", "sample_steps", "save_steps"),
    ),
    1: (
        *("steps", "prompts_per_step", "train_size", "max_prompt_tokens", "max_new_tokens", "micro_batch_tokens"),
        *("replay_num", "replay_capacity", "replay_min_size", "dynamic_sampling_max_rounds", "divergence_top_k"),
        *("heldout_samples", "log_steps", "sample_rows", "nonfinite_limit", "keep_last", "replicas", "threads"),
    ),
    2: ("group_size",),
}


def parse_config(arguments: Sequence[str] = (), *, prog: str = "repo-ops train") -> TrainConfig:
    """The TrainConfig that command line arguments describe: --config FILE.yaml, --KEY VALUE, --task_args.KEY VALUE.

    Later ones win. A mistake prints one sentence and exits with status 2.
    """
    description = (
        "Train a language model with a policy-gradient objective; --dry-run prints the plan and stops there. Where a "
        "setting may be none, write null."
    )
    return parse_settings(TrainConfig, arguments, prog=prog, description=description)


def parse_settings(kind: type[Settings], arguments: Sequence[str], *, prog: str, description: str) -> Settings:
    """An object of the dataclass `kind`, its fields set by a command line and the YAML files that it names."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s [--config FILE.yaml] [--KEY VALUE ...]"
    parser = ArgumentParser(prog=prog, usage=usage, description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below; repeatable")
    parser.add_class_arguments(kind, as_group=False)
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for where, name in _keys(arguments, parser.error):
        if name not in known:
            _refuse_unknown(name, known, where, parser.error)
    namespace = parser.parse_args(list(arguments))
    try:
        return kind(**{name: namespace[name] for name in known})
    except ValueError as error:
        parser.error(str(error))


def _keys(arguments: Sequence[str], error: Any) -> Iterator[tuple[str, str]]:
    """(where, key) of all that a command line sets: on the line and in its YAML files."""
    for place, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        key, _, value = argument[2:].partition("=")
        if key == "config":
            path = value or "".join(arguments[place + 1 : place + 2])
            yield from ((f"{path}: ", name) for name in _keys_of(Path(path), error))
        elif key != "help" and not key.startswith("print_"):
            yield "", key.split(".")[0]


def _keys_of(path: Path, error: Any) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as problem:
        error(f"config: expected a readable YAML file, got {path}; {problem}")
    if not isinstance(content, dict):
        error(f"config: expected key: value lines in {path}, got {type(content).__name__}")
    return [str(key) for key in content]


ELSEWHERE = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "reward_funcs": "reward",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "max_steps": "steps",
    "num_generations": "group_size",
    "per_device_train_batch_size": "prompts_per_step",
    "max_completion_length": "max_new_tokens",
    "max_prompt_length": "max_prompt_tokens",
    "loss_type": "objective",
    "epsilon": "objective_args.eps_low",
    "epsilon_high": "objective_args.eps_high",
    "logging_steps": "log_steps",
    "save_total_limit": "keep_last",
    "resume_from_checkpoint": "resume",
    "gradient_checkpointing": "recompute_layers",
    "use_vllm": "engine",
    "lora_r": "lora_rank",
}
"""Names that users of TRL try first, and ours. Where both count differently (a batch of prompts), --help says how."""


def _refuse_unknown(name: str, known: list[str], where: str, error: Any) -> None:
    if name in ELSEWHERE and ELSEWHERE[name].split(".")[0] in known:
        error(f"{where}unknown key {name!r}; what TRL calls so is {ELSEWHERE[name]!r} here")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    error(f"{where}unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help"))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the run's settings so that `repo-ops train --config PATH` repeats it."""
    import yaml

    values = asdict(config)
    for name in ("betas", "profile_steps"):
        values[name] = values[name] and list(values[name])  # safe YAML has no tuples
    path.write_text(yaml.safe_dump(values, sort_keys=False))


MAY_CHANGE = frozenset(
    {
        *("output_dir", "log_steps", "sample_steps", "sample_rows", "save_completions", "report_to", "project"),
        *("profile_steps", "nonfinite_limit", "eval_steps", "heldout_samples", "eval_k", "eval_success"),
        *("save_model", "push_to_hub", "save_steps", "keep_last", "save_async", "resume"),
        *("eval_data", "eval_data_args", "reward_timeout"),
        # these change results by rounding
        *("device", "threads", "micro_batch_tokens", "engine_args"),
        *("replicas", "cpu_offload", "recompute_layers", "liger"),
    }
)
"""Settings that may differ when a run goes on from a checkpoint; `steps` too, where the learning rate is constant."""


def settings_as_json(config: TrainConfig) -> dict[str, Any]:
    """The settings in the types that JSON gives back."""
    return dict(json.loads(json.dumps(asdict(config))))


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(name, saved, now) of every setting that would make the rest of a saved run another one.

    A setting that was not there yet when the checkpoint was written counts as its default.
    """
    free = MAY_CHANGE | ({"steps"} if config.schedule == "constant" else set())
    defaults, now = settings_as_json(TrainConfig()), settings_as_json(config)
    before = {name: saved.get(name, defaults[name]) for name in now}
    return [(name, before[name], now[name]) for name in now if name not in free and before[name] != now[name]]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step 1, 2, ..., config.steps: linear warm-up, then the schedule, 0 one step past the end.

    A function of the step alone: a run that resumes has nothing to restore.
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - 1 - config.warmup) / max(1, config.steps - config.warmup)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr
