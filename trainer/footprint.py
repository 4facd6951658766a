"""What a run needs of memory and arithmetic, from its settings and the shape of its model; docs/running.md derives it.

Memory is that of one rank. Weights, gradients and AdamW's state are exact. The rest is an estimate: nothing is run on
data, and allocators round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensorMode

from repo_ops.head.plan import CPU_BUDGET, CPU_ROWS, GPU_ROWS
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.distributed import decoder_layers
from repo_ops.trainer.door import make_objective
from repo_ops.trainer.lora import add_lora
from repo_ops.trainer.recompute import recompute_layers
from repo_ops.trainer.rollout import encode_prompts
from repo_ops.trainer.rollout.hf import cache_argument

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from repo_ops.trainer.tasks import Task

__all__ = ["Parameters", "Peak", "Workload", "flops_of_step", "memory_at_rest", "parts_at_peak", "planned_at_rest"]

ACTIVATIONS = "activations of a micro-batch"

SEQUENCES_AT_ONCE = 128
"""Most sequences that rollout/hf.py samples together."""


@dataclass(frozen=True)
class Workload:
    """A step of a run; its sizes are in tokens."""

    config: TrainConfig
    lengths: Sequence[int]
    """Tokens of each prompt to train on."""
    max_new_tokens: int
    ranks: int = 1
    """Processes that share the step out; with more than one, the model is sharded."""
    heldout: Sequence[int] = ()
    """Tokens of each prompt held out."""

    @classmethod
    def of(cls, config: TrainConfig, task: Task, tokenizer: PreTrainedTokenizerBase, *, ranks: int) -> Workload:
        """From a run's settings and its prompts."""
        # of a large data set the first prompts stand for all: it lies on disk and is not read as a whole
        lengths, heldout = (
            [len(ids) for ids in encode_prompts(tokenizer, [example.prompt for example in examples])]
            for examples in (task.train[:1000], task.heldout)
        )
        return cls(config, lengths, config.max_new_tokens or task.max_new_tokens, ranks, heldout)

    @property
    def longest(self) -> int:
        """Of a prompt with one completion."""
        return max(self.lengths) + self.max_new_tokens

    @property
    def replayed(self) -> int:
        """Completions of each prompt, at most."""
        return self.config.replay_num if self.config.replay else 0

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.ranks // self.config.replicas

    @property
    def sampled(self) -> int:
        """Tokens that one rank samples at once, prompts included, at most: in a step or in an evaluation."""
        config, heldout = self.config, self.heldout
        return max(
            min(SEQUENCES_AT_ONCE, -(-prompts // self.ranks) * samples) * (max(each, default=0) + self.max_new_tokens)
            for prompts, samples, each in (
                (config.prompts_per_step, config.group_size, self.lengths),
                (len(heldout), config.heldout_samples, heldout),
            )
        )

    @property
    def row(self) -> int:
        """Longest packed row: a prompt with all its completions, if that fits a micro-batch."""
        whole = max(self.lengths) + (self.config.group_size + self.replayed) * self.max_new_tokens
        return max(min(whole, self.config.micro_batch_tokens), self.longest)

    @property
    def rows(self) -> int:
        """Packed rows of the largest micro-batch."""
        return max(1, min(self.config.micro_batch_tokens // self.row, -(-self.config.prompts_per_step // self.ranks)))

    @property
    def completions(self) -> int:
        """Fresh and replayed completions of a step."""
        return self.config.prompts_per_step * (self.config.group_size + self.replayed)


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model's parameters, and where they are."""

    total: int
    trained: int
    head: int
    """Of the matrix [V, D] that turns hidden states into logits."""
    backbone: int
    """Of all that a token is multiplied with below the head: embeddings are looked up, not multiplied."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parameters:
        """Count them; a tied head counts once in `total`."""
        parameters = list(model.parameters())
        total = sum(p.numel() for p in parameters)
        head, embedding = (layer.weight for layer in (model.get_output_embeddings(), model.get_input_embeddings()))
        return cls(
            total=total,
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            head=head.numel(),
            backbone=total - head.numel() - (0 if head is embedding else embedding.numel()),
        )


def memory_at_rest(model: PreTrainedModel, *, reference: bool) -> dict[str, int]:
    """Bytes on this rank that stay from step to step, by part: exact."""
    weights = sum(_local_bytes(p) for p in model.parameters())
    trained = sum(_local_bytes(p) for p in model.parameters() if p.requires_grad)
    parts = {"weights": weights, "gradients": trained, "AdamW's averages": 2 * trained}
    return {**parts, "reference model": weights} if reference else parts


def planned_at_rest(work: Workload, shape: PretrainedConfig, device: torch.device) -> dict[str, int]:
    """`memory_at_rest` of a run on each of its ranks, without its model."""
    reference = "ref_logps" in make_objective(work.config).reads and not work.config.lora_rank
    with sketched(work.config, shape, device) as model:
        parts = memory_at_rest(model, reference=reference)
    return {name: number // work.shards for name, number in parts.items()}


def _local_bytes(parameter: torch.Tensor) -> int:
    local = getattr(parameter, "_local_tensor", parameter)  # of a sharded one, what lies here
    return local.numel() * local.element_size()


@dataclass(frozen=True)
class Peak:
    """Bytes that come on top, by part: estimates. The two are not there together: generation is over when the learner
    begins.
    """

    learning: dict[str, int]
    generating: dict[str, int]
    """{} where another engine than hf generates: its memory is its own."""

    @property
    def largest(self) -> int:
        """Of the two."""
        return max(sum(self.learning.values()), sum(self.generating.values()))


def parts_at_peak(work: Workload, shape: PretrainedConfig, device: torch.device) -> Peak:
    """What comes on top of `memory_at_rest` while a step learns, and while it generates."""
    config = work.config
    learning = {ACTIVATIONS: activation_bytes(work, shape, device), "head": head_bytes(work, shape, device)}
    generating = {"keys and values": cache_bytes(work, shape, device)}
    with sketched(config, shape, device) as model:
        if work.ranks > 1:
            learning["gathered layers, embeddings and head"] = gathered_bytes(model, config)
            generating["gathered model"] = whole_bytes(model, config) + cast_bytes(model, config, layers=False)
        elif config.autocast:
            generating["weights in bfloat16"] = cast_bytes(model, config, layers=True)
    return Peak(learning, generating if config.engine == "hf" else {})


def whole_bytes(model: PreTrainedModel, config: TrainConfig) -> int:
    """Bytes of the model on each rank while it generates (`repo_ops.trainer.distributed.whole`): layers in the dtype
    that is computed in, embeddings and head in their own.
    """
    layers, rest = _layers_and_rest(model)
    return _bytes_in(_compute_dtype(config), *layers) + sum(p.nbytes for p in rest)


def gathered_bytes(model: PreTrainedModel, config: TrainConfig) -> int:
    """Bytes that FSDP2 gathers at a time while it learns: embeddings, head and their gradient whole; of the layers the
    one that is computed and the next, and one's gradient, once more in float32 to be added up over ranks.
    """
    layers, rest = _layers_and_rest(model)
    compute = _compute_dtype(config)
    largest = max(layers, key=lambda layer: sum(p.numel() for p in layer))
    trained = [p for p in largest if p.requires_grad]
    rest_trained = [p for p in rest if p.requires_grad]
    gradient = _bytes_in(compute, trained) + _bytes_in(torch.float32, trained)
    return sum(p.nbytes for p in [*rest, *rest_trained]) + 2 * _bytes_in(compute, largest) + gradient


def cast_bytes(model: PreTrainedModel, config: TrainConfig, *, layers: bool) -> int:
    """Bytes of the bfloat16 copies that autocast makes of trained float32 weights for its products, and keeps while it
    generates.

    Args:
        layers: of those in the layers too, not of the head alone.
    """
    if not config.autocast or config.dtype != "float32":
        return 0
    head = model.get_output_embeddings().weight
    products = {p for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters(recurse=False)}
    return sum(2 * p.numel() for p in products if p.requires_grad and (layers or p is head))


def _layers_and_rest(model: PreTrainedModel) -> tuple[list[list[torch.nn.Parameter]], list[torch.nn.Parameter]]:
    """The parameters of each layer, and all others."""
    layers = [list(layer.parameters()) for layer in decoder_layers(model)]
    inside = {p for layer in layers for p in layer}
    return layers, [p for p in model.parameters() if p not in inside]


def _compute_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.autocast else getattr(torch, config.dtype)


def _bytes_in(dtype: torch.dtype, *groups: Sequence[torch.nn.Parameter]) -> int:
    return sum(p.numel() * dtype.itemsize for group in groups for p in group)


@contextmanager
def sketched(
    config: TrainConfig, shape: PretrainedConfig, device: torch.device, *, layers: torch.dtype | None = None
) -> Iterator[PreTrainedModel]:
    """The model that a run would train, its tensors without storage; only inside the block.

    Args:
        layers: dtype of the layers' weights (None: that of all).
    """
    from transformers import AutoModelForCausalLM

    # made without a device first: neither initial values nor adapters can be set on tensors without storage
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype)).eval()
        if config.lora_rank:
            add_lora(model, rank=config.lora_rank, alpha=1.0, targets=config.lora_targets)
        for layer in decoder_layers(model) if layers is not None else ():
            layer.to(layers)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model.to_empty(device=device)
        model.tie_weights()
        yield model


def activation_bytes(work: Workload, shape: PretrainedConfig, device: torch.device) -> int:
    """Bytes that autograd keeps of the layers below the head for the largest micro-batch, at the peak.

    With recompute_layers: the input of every layer, and what one of them keeps while it is computed again.
    """
    kept = _saved_bytes(work, shape, device, recompute=work.config.recompute_layers)
    if not work.config.recompute_layers:
        return kept
    whole = _saved_bytes(work, shape, device, recompute=False)
    return kept + (whole - kept) // shape.get_text_config().num_hidden_layers


def _saved_bytes(work: Workload, shape: PretrainedConfig, device: torch.device, *, recompute: bool) -> int:
    """Counted, not modelled: the layers run once on tensors without storage, and what is saved for the backward is
    added up, each storage once, weights left out.
    """
    config, saved = work.config, dict[int, Any]()
    with _layers_of(work, shape, device) as model:
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        if recompute:
            recompute_layers(model)

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage  # kept alive, so that no other storage is given its address
            return tensor

        size = (work.rows, work.row)
        mask = torch.ones(work.rows, 1, work.row, work.row, dtype=torch.bool)
        with _precision(config, device), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.get_decoder()(
                input_ids=torch.zeros(size, dtype=torch.int64),
                position_ids=torch.arange(work.row).expand(size),
                attention_mask=mask,
                use_cache=False,
            )
    return sum(storage.nbytes() for storage in saved.values()) + mask.numel()


def _layers_of(
    work: Workload, shape: PretrainedConfig, device: torch.device
) -> AbstractContextManager[PreTrainedModel]:
    # ranks gather layers in the dtype that is computed in, and give them back: no cast of a weight is kept
    return sketched(work.config, shape, device, layers=_compute_dtype(work.config) if work.ranks > 1 else None)


def _precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.autocast else nullcontext()


def head_bytes(work: Workload, shape: PretrainedConfig, device: torch.device) -> int:
    """Bytes that the fused head holds beyond hidden states and gradients.

    Its tile; for 16-bit weights float32 sums; with `head_autocast` rounded copies of weight and hidden states.
    A tile holds all completion tokens of the micro-batch, unless they are more than the default budget.
    """
    text = shape.get_text_config()
    row = 4 * (text.vocab_size + 3 * text.hidden_size)
    tile = row * work.rows * work.row
    limit = max(CPU_BUDGET, CPU_ROWS * row) if device.type == "cpu" else GPU_ROWS * row
    sums = 4 * text.vocab_size * text.hidden_size if work.config.dtype != "float32" else 0
    copies = 2 * text.hidden_size * (text.vocab_size + work.rows * work.row) if work.config.head_autocast else 0
    return min(tile, limit) + sums + copies


def cache_bytes(work: Workload, shape: PretrainedConfig, device: torch.device) -> int:
    """Bytes of keys and values of the sequences that a rank generates together, each at its full length.

    Counted for one token, like the activations: which of them autocast leaves in float32 is up to the model.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=shape.get_text_config())
    with _layers_of(work, shape, device) as model, _precision(work.config, device), torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.int64)
        model.get_decoder()(input_ids=token, use_cache=True, **{cache_argument(model): cache})
        return work.sampled * sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def flops_of_step(parameters: Parameters, shape: PretrainedConfig, work: Workload) -> dict[str, float]:
    """Floating-point operations of a step by part, if every completion is as long as it may be and none is dead.

    A multiply-add counts 2. A token costs 2 for each weight of the layers forward, and in attention 4 * context * width
    of the heads a layer; backward the same for gradients of inputs, and once more for the share of trained weights. The
    head costs 2 V D for each completion token as often. Generation computes a prompt once for its samples and each new
    token once.
    """
    text = shape.get_text_config()
    width = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * text.num_attention_heads
    prompt = fmean(work.lengths)
    completion = prompt + work.max_new_tokens / 2  # mean context of a completion token
    attention = 4 * text.num_hidden_layers * width
    prompts = work.config.prompts_per_step
    fresh = prompts * work.config.group_size * work.max_new_tokens
    learned = work.completions * work.max_new_tokens
    prompt_flops = prompts * prompt * (2 * parameters.backbone + attention * prompt / 2)
    token_flops = 2 * parameters.backbone + attention * completion
    passes = 2 + parameters.trained / parameters.total
    return {
        "generation": prompt_flops + fresh * (token_flops + 2 * parameters.head),
        "learner, layers": passes * (prompt_flops + learned * token_flops),
        "learner, head": passes * learned * 2 * parameters.head,
    }
