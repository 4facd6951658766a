"""Exact fused policy-gradient losses for language models."""
