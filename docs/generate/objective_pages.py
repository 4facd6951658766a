"""A page for every objective, and their index."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Container, Iterable

from coefficients import own_metrics, reads_ratio
from sources import Field, comments_above, fields_of
from texts import ABOUT, AXES, About

from repo_ops import advantages, kl
from repo_ops.objectives import RECIPES, Objective, base, get_objective, objective_names, recipes
from repo_ops.reduce import REDUCTIONS
from repo_ops.terms.ratio_level import LEVELS
from repo_ops.terms.sampler import MODES
from repo_ops.terms.trust_region import REGIONS

NEEDED = {"dr_grpo": {"max_length": 5}}
"""Hyper-parameters without which a name is refused; 5 is the completion length of SETUP."""

SETUP = """\
import torch
from repo_ops import get_objective, linear_policy_loss

B, T, D, V, K = 2, 5, 8, 11, 3
hidden = torch.randn(B, T, D, requires_grad=True)
weight = torch.nn.Parameter(0.1 * torch.randn(V, D))
targets, advantages = torch.randint(V, (B, T)), torch.tensor([1.0, -1.0])
old_logps, ref_logps, sampler_logps = -2.4 + 0.1 * torch.randn(3, B, T)
extras = {"topk_offsets": -torch.rand(B, T, K), "topk_behaviour_logps": -2 - torch.rand(B, T, K)}"""

PASSES = {
    "token": "3 passes of N V D multiply-adds; with a frozen head weight 2. A token's coefficient needs that token "
    "only.",
    "sequence": "3 passes of N V D multiply-adds while sequences fit in a tile, else 4; with a frozen head weight 2, "
    "else 3. A token's coefficient needs its whole sequence.",
    "batch": "4 passes of N V D multiply-adds, 3 where the micro-batch fits in one tile; with a frozen head weight "
    "3, or 2. A token's coefficient needs the whole micro-batch.",
}

SCENES = {
    "token": "The token's behaviour probability is 0.15.",
    "sequence": "The first of two tokens is moved, the other one stays at ratio 1 (dashed: what that "
    "neighbour gets, where it differs). Behaviour probabilities are 0.15.",
    "batch": "The token (behaviour probability 0.15) is moved beside eight fixed tokens with A = +1 and −1, ratios "
    "0.5 to 2 and probabilities near 0.03; another batch gives another curve.",
}


def made(name: str) -> Objective:
    """The objective with its defaults, and what it cannot do without."""
    return get_objective(name, **NEEDED.get(name, {}))


def sections() -> dict[str, list[str]]:
    """Objective names by axis, in the order of texts.ABOUT; those without a row there come last."""
    names = objective_names()
    ordered = [*(n for n in ABOUT if n in names), *(n for n in names if n not in ABOUT)]
    found = {axis: [n for n in ordered if about(n).axis == axis] for axis in AXES}
    return {axis: listed for axis, listed in found.items() if listed}


def about(name: str) -> About:
    """Axis and use of an objective."""
    return ABOUT.get(name) or About("surrogate", _docstring(name).split("\n")[0])


def page(name: str) -> str:
    """The Markdown of docs/objectives/<name>.md."""
    objective = made(name)
    file = RECIPES[name][0] if name in RECIPES else name
    parts = [f"# {name}", about(name).when, _origin(name, file)]
    parts.append("## Formula")
    if name in RECIPES:
        parts.append(f"That of [`{file}`]({file}.md), with the settings above in place of its own:")
    parts += _docstring(name).split("\n\n")
    parts += ["## Coefficient", f"![coefficient of {name} against the ratio](img/{name}.png)", _scene(name, objective)]
    parts += ["## Hyper-parameters", _own_table(name, objective)]
    shared = _table(_shared(objective), objective, NEEDED.get(name, ()))
    parts += ["Settings that every objective has, as far as they are set here:", shared]
    parts.append("All others: [settings of every objective](README.md#settings-of-every-objective).")
    parts += ["## Cost", _cost(objective), "## Reads", _reads(name, objective)]
    own = own_metrics(objective)
    if own:
        parts += ["## Reports", f"Beside the metrics of every objective: {_listed(own)}."]
    parts += ["## Example", "With the tensors of [the index](README.md#example):", _example(name, objective)]
    return _joined(parts)


def index() -> str:
    """The Markdown of docs/objectives/README.md."""
    parts = [
        "# Objectives",
        "An objective gives every token a loss. It is chosen by name (`get_objective`, or `objective=` of "
        "`linear_policy_loss` and `policy_loss`), and composed with the other axes below; what cannot be combined is "
        "refused with a reason. [Your own](your_own.md) takes 15 lines.",
        "![coefficients of all objectives](gallery.png)",
        "Below zero the update makes the token likelier, above zero rarer. How the curves are computed: "
        "[coefficients.py](../generate/coefficients.py).",
    ]
    values = _axis_values()
    for axis, sentence in AXES.items():
        names = sections().get(axis, [])
        parts += [f"## {axis[0].upper()}{axis[1:]}", sentence]
        if names:
            rows = [f"| [`{n}`]({n}.md) | {made(n).reach} | {_cell(about(n).when)} |" for n in names]
            parts.append("\n".join(["| objective | scope | when to use |", "| --- | --- | --- |", *rows]))
        if axis in values:
            parts.append(values[axis])
    parts += [
        "## Cost by scope",
        "\n".join(f"- {scope}: {sentence}" for scope, sentence in PASSES.items()),
        "N is the number of tokens that carry a gradient, V the vocabulary, D the hidden size. Some shared settings "
        "widen an objective's scope: `off_policy_mask` and sequence-level sampler weights to the sequence, "
        "`top_entropy_quantile` to the batch. `objective.reach` says what a configured objective needs.",
        "## Example",
        "The examples of all pages go on from these tensors.",
        f"```python\n{SETUP}\n```",
        "## Settings of every objective",
        _table(fields_of(base.Objective), Objective()),
    ]
    return _joined(parts)


def _origin(name: str, file: str) -> str:
    source = f"[{file}.py](../../repo_ops/objectives/{file}.py)"
    if name not in RECIPES:
        return f"Defined in {source}; the file also holds a reference in plain Python and values worked by hand."
    settings = ", ".join(f"{key}={value!r}" for key, value in RECIPES[name][1].items())
    note = comments_above(inspect.getsource(recipes), set(RECIPES)).get(name, "")
    link = f"[`{file}`]({file}.md)"
    given = f"{link} with `{settings}`" if settings else f"{link} with its defaults, under the name of its paper"
    return f"Recipe: {given}. Source: {note}." if note else f"Recipe: {given}."


def _docstring(name: str) -> str:
    file = RECIPES[name][0] if name in RECIPES else name
    return inspect.cleandoc(importlib.import_module(f"repo_ops.objectives.{file}").__doc__ or "")


def _scene(name: str, objective: Objective) -> str:
    parts = [f"d loss / d logp of a token for A = +1 and A = −1, before the reduction. {SCENES[objective.reach]}"]
    if name == "spo":
        parts.append("The axis is the ratio to the reference policy, and A stands for the reward.")
    elif not reads_ratio(objective):
        parts.append("The old policy is not read, so the curve is flat.")
    if objective.sampler_weight is not None:
        parts.append("Sampler and old policy agree in the picture, so the sampler weight is 1.")
    if objective.beta:
        parts.append("The KL term is left out.")
    if objective.top_entropy_quantile is not None:
        parts.append("The moved token is the one with the highest entropy, so it learns; the others get nothing.")
    return " ".join(parts)


def _own_table(name: str, objective: Objective) -> str:
    own = [field for field in fields_of(type(objective)) if field.name not in _shared_names()]
    return _table(own, objective) if own else "None of its own."


def _shared(objective: Objective) -> list[Field]:
    """The reduction, and what differs from the default of most objectives."""
    usual = {field.name: field.default for field in dataclasses.fields(Objective)}
    reduction = REDUCTIONS[objective.reduction]
    found = []
    for field in fields_of(type(objective)):
        if field.name == "reduction":
            found.append(field._replace(text=f"{reduction[0].upper()}{reduction[1:]}."))
        elif field.name in usual and getattr(objective, field.name) != usual[field.name]:
            found.append(field)
    return found


def _shared_names() -> set[str]:
    return {field.name for field in dataclasses.fields(Objective)}


def _table(fields: Iterable[Field], values: Objective, required: Container[str] = ()) -> str:
    rows = []
    for field in fields:
        default = "required" if field.name in required else f"`{getattr(values, field.name)!r}`"
        rows.append(f"| `{field.name}` | {default} | {_cell(field.text)} |")
    return "\n".join(["| field | default | effect and usual value |", "| --- | --- | --- |", *rows])


def _cost(objective: Objective) -> str:
    skipped = "Tokens with advantage 0 cost nothing." if objective.skips_zero_advantage else ""
    if skipped and objective.reach == "sequence":
        skipped = "Sequences with advantage 0 cost nothing."
    elif objective.reach == "batch":
        skipped = ""
    return f"Scope {objective.reach}. {PASSES[objective.reach]} {skipped}".strip()


def _reads(name: str, objective: Objective) -> str:
    extras = {"topk_offsets", "topk_behaviour_logps"}
    must = [f"`extras[{n!r}]`" if n in extras else f"`{n}`" for n in sorted(objective.reads - {"entropy"})]
    text = f"Required: `advantages`, {', '.join(must)}." if must else "Required: `advantages`."
    if "old_logps" not in objective.reads and reads_ratio(objective):
        text += " Also `old_logps`; without them the ratio is 1, with the gradient of the current policy."
    if "entropy" in objective.reads:
        text += " Entropies are computed on the way; `policy_loss` takes them as `entropy`."
    if name == "spo":
        text += " Also `extras['baseline']`, one per sequence; without it the soft value of the prompt is 0."
    return text


def _example(name: str, objective: Objective) -> str:
    own = [field for field in fields_of(type(objective)) if field.name not in _shared_names()]
    shown = {f.name: getattr(objective, f.name) for f in own if getattr(objective, f.name) is not None}
    hyper = {**NEEDED.get(name, {}), **dict(list(shown.items())[:2])}
    settings = "".join(f", {key}={_double_quoted(value)}" for key, value in hyper.items())
    given: list[str] = [n for n in ("old_logps", "ref_logps", "sampler_logps") if n in objective.reads]
    if "old_logps" not in given and reads_ratio(objective):
        given.insert(0, "old_logps")
    if any(n.startswith("topk_") for n in objective.reads):
        given.append("extras")
    arguments = ["hidden", "weight", "targets", "advantages", "objective=objective", *(f"{n}={n}" for n in given)]
    lines = [f'objective = get_objective("{name}"{settings})', *_call(arguments), "out.loss.backward()"]
    return "```python\n" + "\n".join(lines) + "\n```"


def _call(arguments: list[str]) -> list[str]:
    """The lines of the call, broken as the formatter breaks them."""
    inside = ", ".join(arguments)
    if len(inside) <= 120 - len("out = linear_policy_loss()"):
        return [f"out = linear_policy_loss({inside})"]
    broken = [f"    {inside}"] if len(inside) <= 116 else [f"    {argument}," for argument in arguments]
    return ["out = linear_policy_loss(", *broken, ")"]


def _axis_values() -> dict[str, str]:
    reductions = [f"| `{name}` | {_cell(text)} |" for name, text in REDUCTIONS.items()]
    levels = [f"| `{name}` | {_cell(_first_line(level.combine))} |" for name, level in LEVELS.items()]
    regions = [f"| `{name}` | {_cell(_first_line(region.keeps))} |" for name, region in REGIONS.items()]
    penalties = [(n, getattr(kl, {"abs": "absolute"}.get(n, n))) for n in kl.KL]
    estimators = [f"[`{n}`](../advantages.md#{n})" for n in advantages.estimator_names()]
    return {
        "ratio level": _values("ratio_level", levels, "of `grpo` and `cispo`"),
        "trust region": _values("clip", regions, "of `rec`, tokens that learn"),
        "reduction": _values("reduction", reductions),
        "KL": _values("kl", [f"| `{n}` | {_cell(_first_line(estimator))} |" for n, estimator in penalties]),
        "sampler correction": f"Values of `sampler_weight`: {_listed(MODES)}. What ends in truncate limits the "
        "weight to [`sampler_min`, `sampler_max`]; what ends in mask drops the tokens outside.",
        "advantage estimator": f"{', '.join(estimators)}: [advantages](../advantages.md).",
    }


def _values(setting: str, rows: list[str], where: str = "") -> str:
    return "\n".join([f"| `{setting}` {where}".rstrip() + " | |", "| --- | --- |", *rows])


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").split("\n")[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _double_quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _joined(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"
