"""Compares mathematical answers; loaded in a child process, because parsing and comparing can hang inside C code."""

from math_verify import parse, verify

# fills caches, so that the first comparison is as quick as the others
verify(parse("1", parsing_timeout=None), parse("$1$", parsing_timeout=None), timeout_seconds=None)


def compare(answer: str, completion: str) -> tuple[bool, bool]:
    """Whether the completion equals the answer, and whether the answer could be read at all."""
    # The caller keeps the time: math_verify's own alarms do not stop C code.
    gold = parse(answer, parsing_timeout=None)
    found = parse(completion, parsing_timeout=None)
    return bool(gold) and bool(verify(gold, found, timeout_seconds=None)), bool(gold)
