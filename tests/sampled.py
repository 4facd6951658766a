"""What a completion's log-probabilities have to be, from one forward of transformers over the whole text."""

import torch

from repo_ops.trainer.rollout import encode_prompts


def true_logps(model, prompt, completion, temperature):
    """Log-probabilities [T, V] at each completion token, without truncation."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def gap(model, tokenizer, prompts, groups, temperature):
    """Largest distance between reported log-probabilities and the true ones, renormalised over the kept tokens."""
    worst = 0.0
    for prompt, group in zip(encode_prompts(tokenizer, prompts), groups, strict=True):
        for c in group:
            logps = true_logps(model, prompt, c, temperature)
            for place, (token, found) in enumerate(zip(c.token_ids, c.logps, strict=True)):
                kept = logps[place, list(c.kept_ids[place])].logsumexp(0) if c.kept_ids else 0.0
                worst = max(worst, abs(float(logps[place, token] - kept) - found))
    return worst
