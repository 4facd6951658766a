"""RePOTrainer: TRL's GRPOTrainer with replay, any objective of this library, and the learner's shared rows.

Generation, rewards, reference model, logging, checkpoints, evaluation and the optimizer are TRL's. Two things differ in
training: `_prepare_inputs` turns a generation into rows and adds replayed ones, `_compute_loss` is ours.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn

import repo_ops
from repo_ops.integrations.trl.config import RePOConfig
from repo_ops.integrations.trl.options import objective_of
from repo_ops.integrations.trl.replay import Record, Replay, prompt_key, with_group
from repo_ops.integrations.trl.rows import Row, RowsLoss, count, rows_of, shared_hidden
from repo_ops.metrics import Metrics, summarize
from repo_ops.reduce import NumItems
from repo_ops.replay import ReplayBuffer

from trl import GRPOTrainer  # isort: skip

__all__ = ["RePOTrainer"]

BUFFER_FILE = "replay_buffer.pt"
NAMES = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "kl": "kl", "entropy": "entropy"}
"""Our metrics that TRL logs too, under its names."""


class RePOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is ours: RePO replay, live sequences only, each prompt computed once.

    Takes the arguments of GRPOTrainer, with a RePOConfig. With replay=None, objective=None and shared_rows=False it is
    GRPOTrainer, bit for bit. Replayed rows carry the log-probabilities that they were sampled with, and are drawn
    before this generation's completions are stored. Checkpoints hold the buffer.

    Raises:
        TypeError: args is no RePOConfig.
        ValueError: the model, or an option, needs what our loss does not have; the message names it.
    Source: arXiv:2506.09340.
    """

    _buffered_inputs: Any
    _tag_names = ["trl", "grpo", "repo"]  # noqa: RUF012  (TRL's own form)
    _name = "RePO"
    _paper = {  # noqa: RUF012
        "title": "RePO: Replay-Enhanced Policy Optimization",
        "id": "2506.09340",
        "citation": "@article{li2025repo, title={{RePO: Replay-Enhanced Policy Optimization}}, "
        "author={Li, Siheng and others}, year={2025}, eprint={arXiv:2506.09340}}",
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: RePOConfig | None = None, *more: Any, **named: Any
    ) -> None:
        if args is None:
            args = RePOConfig(output_dir="RePO")
        if not isinstance(args, RePOConfig):
            raise TypeError(
                f"args: expected a RePOConfig, got {type(args).__name__}; it has the same settings and more"
            )
        super().__init__(model, reward_funcs, args, *more, **named)
        self.replay: Replay | None = None
        self._rewards: Tensor | None = None
        self._first_version: int | None = None
        if not args.uses_ours:
            return
        self._refuse_what_rows_do_not_hold()
        head = repo_ops.Options(operand_dtype=torch.float32 if args.head_float32 else None)
        self.rows_loss = RowsLoss(objective_of(args), args.off_policy_coef, self.temperature, head)
        self._base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._backbone = self._shared_rows() if args.shared_rows else None
        if args.replay is not None:
            buffer = ReplayBuffer(
                args.replay_capacity, args.replay, args.replay_num, args.replay_min_size, seed=args.seed
            )
            self.replay = Replay(buffer, self.temperature, args.estimator)

    def _refuse_what_rows_do_not_hold(self) -> None:
        args, remedy = self.args, "train with TRL's GRPOTrainer and install()"
        refused = {
            "tools, environment_factory": bool(self.tools or self.environment_factories),
            "processing_class: an image processor": self._is_vlm,
            "router_aux_loss_coef of a mixture of experts (set it to 0)": self.aux_loss_enabled,
            "torch_compile": args.torch_compile,
        }
        for what, given in refused.items():
            if given:
                raise ValueError(f"{what}: not supported by RePOTrainer's loss; {remedy}")
        if args.truncates_sampling and self.rollout_func is None:
            raise ValueError(
                "top_p, top_k, min_p, repetition_penalty, generation_kwargs, vllm_structured_outputs_regex: expected "
                "none, since TRL's engines do not report which tokens were kept and every ratio would be biased; "
                "sample from the whole distribution, or return support_ids (the kept ids of each token) from a "
                "rollout_func"
            )
        if args.shared_rows and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "shared_rows: expected False under FSDP or DeepSpeed, whose hooks gather weights for TRL's own "
                "forward; install() puts our head there"
            )

    def _shared_rows(self) -> Any:
        from repo_ops.trainer.backbone import Backbone

        dropout = [name for name, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
        if getattr(self._base.config.get_text_config(), "attention_dropout", 0):
            dropout.append("its attention")
        if dropout:
            raise ValueError(
                f"shared_rows: expected a model without dropout, got some in {dropout[0]}; completions of a prompt "
                "would share it: set it to 0, or shared_rows=False"
            )
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("shared_rows: expected no prompt learning, got virtual tokens; set shared_rows=False")
        backbone = Backbone(self._base)
        _add_policy_forward(self._base)
        return backbone

    def train(self, *args: Any, **named: Any) -> Any:
        """TRL's, with what earlier calls have stored; their samples stay older than those of this one."""
        self._first_version = None  # steps are counted from 0 again, or from the checkpoint's
        return super().train(*args, **named)

    # --- a generation becomes rows

    def _calculate_rewards(self, *args: Any, **named: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **named)
        return self._rewards

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not (self.args.uses_ours and self.model.training):
            return super()._prepare_inputs(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            output = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = self._micro_steps(output, generation_batch)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _micro_steps(self, output: dict[str, Any], examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What each forward and backward of this generation computes: rows, and the counts of its optimizer step."""
        if "tool_mask" in output:
            raise ValueError("env_mask: expected none from rollout_func; RePOTrainer scores whole completions")
        mine = len(examples)
        first = self.accelerator.process_index * mine
        groups = [(first + i) // self.num_generations for i in range(mine)]
        fresh = rows_of(output, groups, self._support_ids(examples, output))
        if self.replay is not None or "sampler_logps" in self.rows_loss.objective.reads:
            fresh = self._with_sampler_logps(fresh)
        replayed: dict[int, list[Row]] = {}
        if self.replay is not None or self.args.advantage_estimator is not None:
            fresh, replayed = self._drawn(fresh, first)
        self._log_groups(fresh, [row for rows in replayed.values() for row in rows])
        steps = self._split(fresh, replayed)
        window = self.args.gradient_accumulation_steps
        counts = torch.tensor([count([*chain(*steps[k : k + window])]) for k in range(0, len(steps), window)])
        counts = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum")
        items = [NumItems(*row.unbind()) for row in counts]
        return [{"rows": rows, "num_items": items[k // window]} for k, rows in enumerate(steps)]

    def _support_ids(self, examples: Sequence[dict[str, Any]], output: dict[str, Any]) -> list[Any] | None:
        if not self.args.truncates_sampling:
            return None
        kept = [example.get("support_ids") for example in examples]
        if any(ids is None for ids in kept):
            raise ValueError(
                "support_ids: expected the kept ids of each token from rollout_func, because sampling is truncated "
                "(top_p, top_k, ...), got none; every ratio would be biased"
            )
        if self._backbone is None or self.beta or "old_per_token_logps" in output:
            raise ValueError(
                "support_ids: expected shared_rows, beta 0 and generations of one optimizer step; TRL's own old and "
                "reference log-probabilities are those of the whole vocabulary"
            )
        return kept

    @torch.no_grad()
    def _with_sampler_logps(self, rows: list[Row]) -> list[Row]:
        """The rows with log-probabilities of the policy that sampled them: the engine's, TRL's, or computed here."""
        if all(row.sampler_logps is not None for row in rows):
            return rows
        if all(row.old_logps is not None for row in rows):  # TRL has computed them, of the same weights
            return [replace(row, sampler_logps=row.old_logps) for row in rows]
        # every row takes part, masked ones as well: ranks must run as many forwards as each other
        found = self._logps([row if row.token_ids else _anchor(row) for row in rows])
        return [replace(row, sampler_logps=logps[: len(row.token_ids)]) for row, logps in zip(rows, found, strict=True)]

    def _logps(self, rows: list[Row]) -> list[tuple[float, ...]]:
        """Log-probabilities of each row's tokens now."""
        if self._backbone is None:
            flat, _ = self._padded_logps(self.model, rows, compute_entropy=False)
            return [tuple(part.tolist()) for part in flat.split([len(row.token_ids) for row in rows])]
        with self.accelerator.autocast():
            hidden, targets, order = shared_hidden(self._backbone, rows, self.args.row_tokens)
            head = repo_ops.causal_lm.find_head(self._base)
            stats = repo_ops.linear_logps(
                hidden,
                targets=targets,
                temperature=self.temperature,
                options=self.rows_loss.options,
                **head.arguments(hidden),
            )
        parts = stats.logps.split([len(rows[i].token_ids) for i in order])
        found = dict(zip(order, parts, strict=True))
        return [tuple(found[i].tolist()) for i in range(len(rows))]

    def _drawn(self, fresh: list[Row], first: int) -> tuple[list[Row], dict[int, list[Row]]]:
        """The fresh rows with their advantages, and the replayed rows of each group that begins on this rank."""
        eos = set(self.eos_token_ids)
        records = gather_object(
            [
                Record(
                    prompt_key(row.prompt_ids),
                    row.token_ids,
                    tuple(min(x, 0.0) for x in row.sampler_logps or ()),
                    bool(row.token_ids) and row.token_ids[-1] in eos,
                )
                for row in fresh
            ]
        )
        rewards = self._total_rewards()
        if self.replay is None:
            advantages = repo_ops.group_advantages(
                torch.tensor(rewards),
                torch.arange(len(records)) // self.num_generations,
                lengths=torch.tensor([len(record.token_ids) for record in records]),
                **self.args.estimator,
            ).tolist()
            drawn: dict[str, list[Row]] = {}
        else:
            drawn, advantages = self.replay.rows(records, rewards, version=self._version())
        if self.args.advantage_estimator is not None or self.args.advantage_mode == "mixed":
            fresh = [replace(row, advantage=advantages[first + i]) for i, row in enumerate(fresh)]
        begins: dict[str, int] = {}
        for place, record in enumerate(records):
            begins.setdefault(record.prompt, place)
        here = {prompt: place for prompt, place in begins.items() if first <= place < first + len(fresh)}
        return fresh, {
            place // self.num_generations: with_group(drawn[prompt], place // self.num_generations)
            for prompt, place in here.items()
            if drawn.get(prompt)
        }

    def _version(self) -> int:
        """Of the policy, in optimizer steps: later than all that was stored before this train() began."""
        assert self.replay is not None
        if self._first_version is None:
            newest = self.replay.buffer.newest
            self._first_version = 0 if newest is None else max(0, newest + 1 - self.state.global_step)
        return self._first_version + self.state.global_step

    def _total_rewards(self) -> list[float]:
        """Of every completion of all ranks, as TRL adds them up; NaN where no function gave a number."""
        assert self._rewards is not None
        weighted = self._rewards * self.reward_weights.to(self._rewards.device)
        total = weighted.nansum(dim=1)
        total[torch.isnan(self._rewards).all(dim=1)] = torch.nan
        return total.tolist()

    def _split(self, fresh: list[Row], replayed: dict[int, list[Row]]) -> list[list[Row]]:
        """Rows of each micro-step: as many fresh ones as TRL's, groups together, replayed ones with their group."""
        order = torch.randperm(len(fresh)).tolist()  # TRL shuffles here: the same numbers leave the generator
        at = {group: i for i, group in reversed(list(enumerate(fresh[j].group for j in order)))}
        shuffled = sorted((fresh[j] for j in order), key=lambda row: at[row.group])
        size = len(shuffled) // self.args.steps_per_generation
        steps = [shuffled[k * size : (k + 1) * size] for k in range(self.args.steps_per_generation)]
        seen: set[int] = set()
        for step in steps:
            for group in dict.fromkeys(row.group for row in step):
                if group not in seen:
                    step.extend(replayed.get(group, []))
                    seen.add(group)
        return steps

    # --- the loss of rows

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if "rows" not in inputs:
            return super()._compute_loss(model, inputs)
        rows, items = inputs["rows"], inputs["num_items"]
        live = [row for row in rows if self.rows_loss.is_live(row)]
        # a micro-step without any live row still takes part in the backward of all ranks, with a gradient of zero
        chosen = live or [_anchor(rows[0])]
        if self._backbone is not None:
            with self.accelerator.autocast():
                loss, metrics = model(policy_loss=lambda base: self._of_hidden(base, chosen, items))
        else:
            compute_entropy = "entropy" in self.rows_loss.objective.reads
            logps, entropy = self._padded_logps(model, chosen, compute_entropy=compute_entropy)
            loss, metrics = self.rows_loss.of_logps(logps, entropy, chosen, items)
        if live:
            self._log_loss(metrics, live)
        return loss * (self.accelerator.num_processes if live else 0.0)

    def _of_hidden(self, base: Any, rows: list[Row], items: NumItems) -> tuple[Tensor, Metrics]:
        return self.rows_loss.of_hidden(base, self._backbone, rows, items, self.args.row_tokens)

    def _padded_logps(self, model: Any, rows: list[Row], *, compute_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """[N] log-probabilities and entropies of the rows' tokens through TRL's own forward, row by row."""
        device, pad = self.accelerator.device, self._tokenizer.pad_token_id
        prompt, length = (max(len(getattr(row, name)) for row in rows) for name in ("prompt_ids", "token_ids"))
        ids = torch.full((len(rows), prompt + length), pad, device=device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            span = slice(prompt - len(row.prompt_ids), prompt + len(row.token_ids))
            ids[i, span] = torch.tensor([*row.prompt_ids, *row.token_ids], device=device)
            mask[i, span] = 1
        logps, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            ids,
            mask,
            length,
            batch_size=None if torch.is_grad_enabled() else self.args.per_device_train_batch_size,
            compute_entropy=compute_entropy,
        )
        scored = mask[:, prompt:].bool()
        return logps[scored], None if entropy is None else entropy[scored]

    # --- what is logged and kept

    def _log_loss(self, metrics: Metrics, live: Sequence[Row]) -> None:
        logged = self._metrics["train"]
        for name, value in summarize(metrics).items():
            logged[NAMES.get(name, f"policy/{name}")].append(value)
        logged["rows/live"].append(float(len(live)))

    def _log_groups(self, fresh: Sequence[Row], replayed: Sequence[Row]) -> None:
        """Which share of this rank's prompts teaches anything, by fresh and by replayed completions."""
        logged, every = self._metrics["train"], {row.group for row in fresh}
        on, off = ({row.group for row in rows if row.advantage} for rows in (fresh, replayed))
        for name, groups in {"effective_on": on, "effective_off": off, "effective": on | off}.items():
            logged[f"groups/{name}"].append(len(groups) / len(every))
        if self.replay is not None:
            logged["replay/groups_drawn"].append(float(len({row.group for row in replayed})))
            logged["replay/rows_drawn"].append(float(len(replayed)))
            logged["replay/not_stored"].append(float(self.replay.not_stored))
            for name, value in self.replay.buffer.metrics(self._version()).items():
                logged[name].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.replay is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            torch.save(self.replay.buffer.state_dict(), folder / BUFFER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.replay is None or checkpoint is None:
            return
        path = Path(checkpoint, BUFFER_FILE)
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint: expected {BUFFER_FILE} in {checkpoint}, which a run with replay writes; "
                "resume with replay=None, or from a checkpoint of a RePOTrainer"
            )
        self.replay.buffer.load_state_dict(torch.load(path, weights_only=True))


def _add_policy_forward(model: Any) -> None:
    """`model(policy_loss=f)` is f(model), run inside the forward, where wrappers (DDP, autocast) expect all work."""
    inner = model.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, policy_loss: Callable[[Any], Any] | None = None, **named: Any) -> Any:
        return inner(*args, **named) if policy_loss is None else policy_loss(self)

    model.forward = types.MethodType(forward, model)


def _anchor(row: Row) -> Row:
    """A row of one token without weight, for a micro-step that has nothing to learn."""
    none = (0.0,)
    return Row(row.prompt_ids, row.prompt_ids[-1:], 0.0, old_logps=none, sampler_logps=none, ref_logps=none)
