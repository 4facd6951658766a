"""A Hugging Face causal language model whose forward returns log-probabilities and entropies instead of logits."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from repo_ops.causal_lm import find_head
from repo_ops.linear_logps import linear_logps
from repo_ops.options import Options, as_options

__all__ = ["patch_causal_lm"]

IGNORED = -100
"""The label of tokens that are not scored."""
ADDED = ("labels", "shift_labels", "temperature")
_PATCH, _WANTED = "_repo_ops_patch", "_repo_ops_wanted"


def patch_causal_lm(model: Any, *, options: Options | None = None) -> Callable[[], None]:
    """A function that undoes the patch; until then model(input_ids, labels=labels) returns logps and no logits.

    With `labels` [B, T] (as ever: labels[:, t] is the token at t, -100 is not scored) the output has logps[:, t] and
    entropy[:, t], the log-probability of labels[:, t] given the tokens before it and the entropy of that distribution,
    both float32 and differentiable, 0 where not scored, and `mask` [B, T] bool, where they were. With `shift_labels`
    instead, position t predicts shift_labels[:, t] and the outputs are in that order. `temperature` (a number, [B], or
    [B, T] in the order of the labels) divides the logits. Tokens that are not scored cost nothing in the head. Without
    labels the forward, and so `generate`, is the model's own. There is no `loss`; a router's `aux_loss` is passed on.

    The head runs inside its own module's forward: any FSDP2 wrapping (a unit of its own too), LoRA on the head, bias,
    softcap and logit scale are what they are in the model. Patch before wrapping; a PeftModel's base model is patched.
    `options` are the head's: backend, memory budget and precision (see repo_ops.Options).

    Raises:
        TypeError, ValueError: no head was found, or one that is not known (see find_head).
        RuntimeError: it is patched already, or its forward does not call its output embedding once.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not issubclass(kind := type(base), nn.Module):
        raise TypeError(f"model: expected a causal language model of transformers, got {kind.__name__}; load it first")
    if _PATCH in base.__dict__:
        raise RuntimeError("model: its forward is patched already; call the function that the first patch returned")
    find_head(base)
    head = base.get_output_embeddings()
    patch = _Patch(_instance_forward(base), _instance_forward(head), as_options(options))
    base.__dict__[_PATCH] = patch
    _set_forward(base, _model_forward, base.forward)
    _set_forward(head, _head_forward, head.forward)
    # after FSDP's own hook, so that the tensors seen are those whose gradient it waits for
    hook = head.register_forward_hook(_keep_output)

    def undo() -> None:
        if base.__dict__.get(_PATCH) is not patch:
            raise RuntimeError("model: this patch was undone already")
        for module, ours in ((base, _model_forward), (head, _head_forward)):
            if getattr(module.__dict__.get("forward"), "_repo_ops", None) is not ours:
                raise RuntimeError(
                    f"model: the forward of {type(module).__name__} was wrapped after patch_causal_lm; undo that first"
                )
        hook.remove()
        for module, before in ((base, patch.model_forward), (head, patch.head_forward)):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        del base.__dict__[_PATCH]

    return undo


@dataclasses.dataclass(frozen=True)
class _Patch:
    """The forwards that the instances had of their own (None: that of the class is in use), and the head's options."""

    model_forward: Any
    head_forward: Any
    options: Options


@dataclasses.dataclass
class _Wanted:
    """One call's question to the head, and its answer."""

    find_arguments: Callable[[Tensor], dict[str, Any]]
    targets: Tensor
    """[B, T], position t predicts targets[:, t]."""
    temperature: float | Tensor
    options: Options
    found: Tensor | None = None
    """[B, T, 2], log-probability and entropy."""


def _instance_forward(module: nn.Module) -> Any:
    return module.__dict__.get("forward")


def _set_forward(module: nn.Module, forward: Callable[..., Any], before: Callable[..., Any]) -> None:
    """Make `forward(module, before, ...)` the forward of this instance, with the signature of the old one.

    A method of the instance: a deep copy of the model gets one that is bound to the copy.
    """
    of_class = "forward" not in module.__dict__

    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = MethodType(type(self).forward, self) if of_class else before
        return forward(self, inner, *args, **kwargs)

    bound._repo_ops = forward  # type: ignore[attr-defined]
    bound.__signature__ = _signature(before)  # type: ignore[attr-defined]
    module.__dict__["forward"] = MethodType(bound, module)


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """That of `forward` as a method, and the arguments that the patch reads; Trainer keeps columns by their names."""
    kind = inspect.Parameter.KEYWORD_ONLY
    given = list(inspect.signature(forward).parameters.values())
    more = [inspect.Parameter(n, kind, default=None) for n in ADDED if n not in {p.name for p in given}]
    last = len(given) - (bool(given) and given[-1].kind is inspect.Parameter.VAR_KEYWORD)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([own, *given[:last], *more, *given[last:]])


def _model_forward(
    self: Any,
    inner: Callable[..., Any],
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float | Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if labels is None and shift_labels is None:
        if temperature is not None:
            raise ValueError("temperature: expected labels or shift_labels beside it, got neither; logits have none")
        return inner(*args, **kwargs)
    if isinstance(kwargs.get("logits_to_keep", 0), Tensor) or kwargs.get("logits_to_keep", 0):
        raise ValueError(f"logits_to_keep: expected none beside labels; label tokens {IGNORED} that are not scored")
    kwargs.pop("num_items_in_batch", None)  # Trainer's, for a loss of the model's own, which there is not
    targets = _shifted(labels) if shift_labels is None else shift_labels
    temperature = 1.0 if temperature is None else temperature
    if shift_labels is None and isinstance(temperature, Tensor) and temperature.shape == targets.shape:
        temperature = torch.cat([temperature[:, 1:], temperature[:, -1:]], 1)
    head = self.get_output_embeddings()
    options = self.__dict__[_PATCH].options
    wanted = _Wanted(lambda hidden: find_head(self).arguments(hidden), targets, temperature, options)
    head.__dict__[_WANTED] = wanted
    try:
        outputs = inner(*args, **{**kwargs, "return_dict": True})
    finally:
        del head.__dict__[_WANTED]
    if wanted.found is None:
        raise RuntimeError(
            f"model: expected the forward of {type(self).__name__} to call its output embedding, which it did not; "
            "call repo_ops.linear_logps on its hidden states"
        )
    logps, entropy, mask = *wanted.found.unbind(-1), targets != IGNORED
    if shift_labels is None:
        logps, entropy, mask = (_aligned(x) for x in (logps, entropy, mask))
    kept = {key: value for key, value in outputs.items() if key not in ("loss", "logits")}
    found: Any = type(outputs)
    return _output_type(found)(logps=logps, entropy=entropy, mask=mask, **kept)


def _head_forward(self: Any, inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[B, T, 2] in place of logits while the model's forward asks for it; what the model does to them is dropped."""
    wanted: _Wanted | None = self.__dict__.get(_WANTED)
    if wanted is None:
        return inner(hidden, *args, **kwargs)
    if hidden.shape[:-1] != wanted.targets.shape:
        raise ValueError(
            f"labels: expected shape {list(hidden.shape[:-1])} like the hidden states at the head, got "
            f"{list(wanted.targets.shape)}"
        )
    mask = wanted.targets != IGNORED
    found = linear_logps(
        hidden,
        targets=wanted.targets,
        mask=mask,
        with_entropy=True,
        temperature=wanted.temperature,
        options=wanted.options,
        **wanted.find_arguments(hidden),
    )
    assert found.entropy is not None
    return torch.stack([found.logps, found.entropy], -1)


def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    wanted: _Wanted | None = module.__dict__.get(_WANTED)
    if wanted is None:
        return
    if wanted.found is not None:
        raise RuntimeError("model: expected its forward to call its output embedding once, it did so again")
    wanted.found = output


def _shifted(labels: Tensor | None) -> Tensor:
    assert labels is not None
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)


def _aligned(values: Tensor) -> Tensor:
    """In the order of labels: nothing predicts the first."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)


@functools.cache
def _output_type(of: type) -> Any:
    """A ModelOutput with logps, entropy and mask, and the other fields of `of`: FSDP and accelerate look inside."""
    from transformers.utils import ModelOutput

    names = [field.name for field in dataclasses.fields(of) if field.name not in ("loss", "logits")]
    fields = [(name, Any, dataclasses.field(default=None)) for name in ("logps", "entropy", "mask", *names)]
    found = dataclasses.make_dataclass(f"{of.__name__}WithLogps", fields, bases=(ModelOutput,))
    found.__module__ = __name__
    return found
