"""The table of what is constant in traced calls; an operator's int is a place in it.

A graph may be run for as long as the process lives, so nothing is ever taken out. Calls whose constants are equal share
a place: the table grows with the settings that are traced, not with the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import torch

from repo_ops.compiled.arguments import Constants
from repo_ops.objectives import Objective, as_objective

_CALLS: list[Constants] = []
_PLACES: dict[Hashable, int] = {}


@torch.compiler.assume_constant_result
def kept(device: str, *values: Any) -> int:
    """The place of the Constants of these values (Dynamo gives a named tuple's values back, not its type).

    `device`: type of the device. What autocast does there now is written into the options, since graphs run without it.
    """
    constants = Constants(*values)
    operand_dtype = constants.options.rounds_to(device) or torch.float32
    constants = constants._replace(options=dataclasses.replace(constants.options, operand_dtype=operand_dtype))
    objective = constants.objective
    if isinstance(objective, str):
        objective = as_objective(objective)
    key = constants._replace(objective=_by_value(objective) if isinstance(objective, Objective) else id(objective))
    if key not in _PLACES:
        # it holds on to a function, whose id no other one can then have
        kept_objective = None if objective is None else as_objective(objective)
        _PLACES[key] = len(_CALLS)
        _CALLS.append(constants._replace(objective=kept_objective))
    return _PLACES[key]


def constants_of(call: int) -> Constants:
    """What is constant in the call at this place."""
    return _CALLS[call]


def _by_value(objective: Objective) -> Hashable:
    """A key that objectives share whose class and settings are equal; of one that holds anything else, its identity."""
    settings = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    if vars(objective) != settings:
        return id(objective)
    try:
        hash(key := (type(objective), *settings.values()))
    except TypeError:
        return id(objective)
    return key
