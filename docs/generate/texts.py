"""What no source file says: an objective's axis, and when to use it.

An objective without a row here still gets its page: axis "surrogate", and the first line of its file's docstring.
"""

from __future__ import annotations

from typing import NamedTuple


class About(NamedTuple):
    """Where the index lists an objective, and one sentence on when it is the one to take."""

    axis: str
    when: str


AXES = {
    "surrogate": "What a token's loss is, as a function of its log-probability and advantage.",
    "ratio level": "Whose ratio to the old policy weighs or stops a token: its own, its sequence's, its prefix's.",
    "trust region": "Which tokens may still be moved, and how far.",
    "reduction": "How tokens are averaged; every objective takes `reduction=`.",
    "KL": "How drift from a reference policy is penalised; every objective takes `beta=`, `kl=` and `kl_reduction=`.",
    "sampler correction": "What makes up for an inference engine that samples from slightly other probabilities; every "
    "objective takes `sampler_weight=`, `sampler_min=`, `sampler_max=` and `off_policy_mask=`.",
    "advantage estimator": "What every sample is worth beside its peers: an argument of `group_advantages`, chosen "
    "apart from the objective.",
}

ABOUT = {
    "grpo": About("surrogate", "The place to start: a few updates per batch, one advantage per completion."),
    "repo": About("surrogate", "Groups often end with equal rewards, and earlier completions are at hand to replay."),
    "ppo": About("surrogate", "PPO's clip with every token weighing the same, for comparison with PPO papers."),
    "cispo": About("surrogate", "Rare but decisive tokens must keep their gradient although their ratio has grown."),
    "cispo_verl": About("surrogate", "To reproduce runs of verl's CISPO, whose cap is a narrow width above 1."),
    "sapo": About("surrogate", "A hard clip makes training jumpy: here the gate closes smoothly."),
    "reinforce": About("surrogate", "Strictly one update per batch, or a baseline without any off-policy correction."),
    "rec": About("surrogate", "To combine a clip mask, a weight and a regulariser of the REC family by hand."),
    "red_weight": About("surrogate", "Off-policy data of mixed quality: good samples shall count more, bad ones less."),
    "rep_asymre": About("surrogate", "Stale data without log-probabilities: a lowered baseline favours good samples."),
    "rep_opmd": About("surrogate", "Off-policy data with log-probabilities: a squared penalty holds the policy near."),
    "opmd": About("surrogate", "Mirror descent with a cautious step, with the advantages of the same name."),
    "opo": About("surrogate", "Exactly on-policy training with the length-weighted baseline of the same name."),
    "gpg": About("surrogate", "The plainest policy gradient, with the scaled advantages of the same name."),
    "kimi": About("surrogate", "A squared pull to the old policy is preferred to clipping its ratio."),
    "spo": About("surrogate", "Data from any source, without its log-probabilities, but with a reference policy."),
    "gspo": About("ratio level", "Token ratios are noisy, as with mixtures of experts or long completions."),
    "gspo_token": About("ratio level", "GSPO's stability is wanted, and advantages differ within a sequence."),
    "luspo": About("ratio level", "GSPO makes completions shorter than the task needs: longer ones weigh more here."),
    "gmpo": About("ratio level", "A few outlying token ratios upset GRPO, and a geometric mean shall absorb them."),
    "rloo": About("ratio level", "A completion is one action: short completions, close to on-policy."),
    "minpro": About("ratio level", "Stale data, where a token whose prefix has become unlikely should weigh less."),
    "minpro_ppo": About("ratio level", "MinPRO's prefix weight with PPO's clip in place of a cap."),
    "topr": About("ratio level", "Off-policy data with many mistakes, which must not be pushed down without end."),
    "vespo": About("ratio level", "Stale or asynchronous data, where whole-sequence ratios are right but too wild."),
    "rec_sequence_one_side_is": About("ratio level", "The REC family judged and weighed by the sequence's mean ratio."),
    "dual_clip_ppo": About("trust region", "Mistakes with huge ratios dominate PPO's gradient: it stops at 3."),
    "delta_two_sided": About("trust region", "Asynchronous training, where ratios of mistakes explode: stop at delta."),
    "bnpo": About("trust region", "To follow BNPO's own actor, with the advantages of the same name."),
    "bapo": About("trust region", "Negative samples drown the positive ones, and entropy falls: bounds adapt to it."),
    "bapo_open_code": About("trust region", "To reproduce runs of BAPO's published code, whose rule differs."),
    "clip_cov": About("trust region", "Entropy collapses early: a few tokens that drive it down get no gradient."),
    "kl_cov": About("trust region", "Entropy collapses early, and a penalty on a few tokens is preferred to dropping."),
    "high_entropy": About("trust region", "Long reasoning: a few undecided tokens carry what is to be learned."),
    "dppo": About("trust region", "Rare tokens should be free to grow: a ratio of 3 at probability 1e-4 moves little."),
    "dppo_kl": About("trust region", "DPPO with the KL bound, which reacts more to tokens that had been rare."),
    "dppo_repo": About("trust region", "To reproduce runs of DPPO's published code, with its constant capped weight."),
    "dppo_prime_rl": About("trust region", "To reproduce prime-rl's default loss."),
    "dppo_topk": About("trust region", "DPPO, where the shift of other likely tokens shall count too."),
    "ipo": About("trust region", "DPPO that ignores the sign of the advantage: also no pull back from far outside."),
    "rec_one_side_nois": About("trust region", "REINFORCE on stale data: the clip alone, without a ratio as weight."),
    "rec_one_side_is": About("trust region", "PPO's gradient, written as REINFORCE with a constant ratio."),
    "rec_two_side_nois": About("trust region", "The most cautious mask: nothing outside the bounds learns."),
    "rec_two_side_is": About("trust region", "The cautious mask with the ratio as weight."),
    "rec_ring_nois": About("trust region", "Nothing just outside the bounds learns, but far outside is pulled back."),
    "rec_ring_is": About("trust region", "The ring with the ratio as weight."),
    "dapo": About("reduction", "Long completions should weigh by their tokens, and rare tokens need room to grow."),
    "dr_grpo": About("reduction", "Completions grow for no reason: a constant denominator does not reward length."),
    "bnpo_loss_type": About("reduction", "To reproduce TRL's or Liger's loss type of that name."),
    "deepseek_v32": About("KL", "A reference policy matters, and stale mistakes are to be left out."),
    "decoupled_ppo": About("sampler correction", "Asynchronous rollouts: behaviour and proximal policy differ."),
    "areal": About("sampler correction", "Asynchronous rollouts, where tokens far from their sampler are dropped."),
    "grpo_tis": About("sampler correction", "Engine and trainer disagree a little (kernels, quantisation)."),
    "grpo_mis": About("sampler correction", "Engine and trainer disagree a lot on some sequences: leave those out."),
}
