"""Which rank keeps a prompt's samples."""

from __future__ import annotations

from hashlib import blake2b


def home_rank(prompt: str, world_size: int) -> int:
    """Rank in [0, world_size) that stores and replays this prompt.

    The same on every machine, in every process and every Python version, unlike `hash()`. With prompts that stay at
    home no sample ever travels, and a restart with another world size hands each saved prompt to its new home:

        buffer.load_state_dicts(states, keep=lambda prompt: home_rank(prompt, world_size) == rank)

    Raises:
        ValueError: world_size < 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size: expected >= 1, got {world_size}")
    return int.from_bytes(blake2b(prompt_bytes(prompt), digest_size=8).digest(), "big") % world_size


def prompt_bytes(prompt: str) -> bytes:
    """The prompt's bytes, for hashing. Half a surrogate pair, which broken JSON can hold, is kept as it is."""
    return prompt.encode("utf-8", "surrogatepass")
