"""The names and signatures that callers rely on. A change here is a change for every user: see CHANGELOG.md."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import repo_ops

HEAD = {"bias", "temperature", "softcap", "logit_scale", "options"}
LOSS = {
    "objective",
    "mask",
    "old_logps",
    "ref_logps",
    "sampler_logps",
    "off_policy",
    "off_policy_coef",
    "num_items",
    "cu_seqlens",
}

# name -> (positional parameters, keyword-only parameters that must be there; more may follow)
FUNCTIONS = {
    "linear_stats": (["hidden", "weight", "targets"], HEAD | {"mask", "statistics"}),
    "linear_logps": (["hidden", "weight", "targets"], HEAD | {"mask", "with_entropy"}),
    "linear_policy_loss": (["hidden", "weight", "targets", "advantages"], HEAD | LOSS),
    "policy_loss": (["logps", "advantages"], LOSS),
    "group_advantages": (["rewards", "group_ids"], {"off_policy", "mode", "estimator", "lengths"}),
    "get_objective": (["name"], set()),
    "objective_names": ([], set()),
    "patch_causal_lm": (["model"], set()),
}
VALUES = {
    "NumItems",
    "Objective",
    "Options",
    "PolicyLoss",
    "ReplayBuffer",
    "Stat",
    "TokenStats",
    "Tokens",
    "VocabularyStats",
}
PUBLIC = sorted({*FUNCTIONS, *VALUES, "replay", "summarize"})


def test_the_list_of_public_names() -> None:
    # A name more or less is a decision about what users may rely on: change this list and CHANGELOG.md with it.
    assert sorted(repo_ops.__all__) == PUBLIC


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(repo_ops.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and not node.orelse and len(node.body) > 1]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen) == PUBLIC
    for name, module in seen.items():
        assert getattr(repo_ops, name) is getattr(import_module(str(module)), name), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name: str) -> None:
    positional, keywords = FUNCTIONS[name]
    parameters = inspect.signature(getattr(repo_ops, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert keywords <= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_is(name: str) -> None:
    documentation = getattr(repo_ops, name).__doc__ or "(none)"
    assert documentation.splitlines()[0].endswith("."), f"{name}: the docstring's first line is one sentence"


def test_results_unpack_by_the_names_of_the_contract() -> None:
    for name, fields in (
        ("TokenStats", ("logps", "entropy")),
        ("PolicyLoss", ("loss", "logps", "entropy", "metrics")),
    ):
        parameters = list(inspect.signature(getattr(repo_ops, name)).parameters)
        assert parameters[: len(fields)] == list(fields)
