"""Objectives that are another objective with other settings: a row each, no code."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    # arXiv 2503.20783: the sum over tokens is divided by a constant, so that length is not rewarded
    "dr_grpo": ("grpo", {"reduction": "const"}),
    # arXiv 2503.14476: clip-higher, every token weighs the same
    "dapo": ("grpo", {"reduction": "token-mean", "eps_high": 0.28}),
    # TRL's and Liger's loss_type "bnpo": token mean of the local micro-batch (pass no num_items)
    "bnpo_loss_type": ("grpo", {"reduction": "token-mean"}),
    # arXiv 2506.02864, the authors' actor; its Beta normalisation is group_advantages(estimator="bnpo")
    "bnpo": ("grpo", {"reduction": "seq-mean-token-sum", "eps_high": 0.28, "delta": 10.0}),
    # arXiv 1707.06347, every token weighs the same
    "ppo": ("grpo", {"reduction": "token-mean"}),
    # arXiv 1912.09729; verl's default
    "dual_clip_ppo": ("grpo", {"reduction": "token-mean", "delta": 3.0}),
    # arXiv 2505.07291
    "delta_two_sided": ("grpo", {"delta": 4.0}),
    # arXiv 2110.00641: behaviour policy sampler_logps, proximal policy old_logps
    "decoupled_ppo": ("grpo", {"reduction": "token-mean", "sampler_weight": "token_truncate"}),
    # arXiv 2505.24298 (AReaL): tokens whose weight exceeds the cap are dropped
    "areal": ("grpo", {"reduction": "token-mean", "sampler_weight": "token_mask", "sampler_max": 5.0}),
    # verl's truncated importance sampling, and TRL's masked sequences
    "grpo_tis": ("grpo", {"sampler_weight": "token_truncate", "sampler_max": 2.0}),
    "grpo_mis": ("grpo", {"sampler_weight": "sequence_mask", "sampler_max": 3.0}),
    # arXiv 2512.02556: drifted mistakes are dropped, the KL is unbiased; neither number is published
    "deepseek_v32": ("grpo", {"off_policy_mask": 0.5, "kl": "unbiased", "beta": 0.001}),
    # arXiv 2506.01939: only the fifth of tokens with the highest entropy learns
    "high_entropy": ("grpo", {"reduction": "token-mean", "eps_high": 0.28, "top_entropy_quantile": 0.2}),
    # arXiv 2602.05261: GSPO's loss times the sequence's length
    "luspo": ("gspo", {"reduction": "seq-mean-token-sum", "eps_low": 2e-3, "eps_high": 2.5e-3}),
    # verl's CISPO: both bounds are widths
    "cispo_verl": ("cispo", {"eps_high": 0.2}),
    # arXiv 2602.04879 with the KL bound, the authors' code, prime-rl's default and its symmetric mask
    "dppo_kl": ("dppo", {"divergence": "kl", "delta_low": 0.05, "delta_high": 0.05}),
    "dppo_repo": ("dppo", {"form": "repo", "ratio_cap": 10.0}),
    "dppo_prime_rl": ("dppo", {"delta_low": 0.2, "delta_high": 0.2, "kl_tau": 1e-3}),
    "ipo": ("dppo", {"symmetric": True, "delta_low": 0.1, "delta_high": 0.1, "kl_tau": 1e-3}),
    # arXiv 2601.22718 with PPO's clip
    "minpro_ppo": ("minpro", {"surrogate": "ppo"}),
    # WooooDyy/BAPO, bapo_trainer.yaml
    "bapo_open_code": (
        "bapo",
        {
            "rule": "open_code",
            "target": 1.0,
            "low_max": 0.8,
            "low_step": 0.05,
            "high_max": 2.0,
            "delta": 3.0,
        },
    ),
    # arXiv 2509.24203
    "reinforce": ("rec", {}),
    "rec_one_side_nois": ("rec", {"clip": "one_side"}),
    "rec_one_side_is": ("rec", {"clip": "one_side", "weight": "ratio"}),
    "rec_two_side_nois": ("rec", {"clip": "two_side"}),
    "rec_two_side_is": ("rec", {"clip": "two_side", "weight": "ratio"}),
    "rec_ring_nois": ("rec", {"clip": "ring"}),
    "rec_ring_is": ("rec", {"clip": "ring", "weight": "ratio"}),
    "rec_sequence_one_side_is": (
        "rec",
        {"clip": "sequence_one_side", "weight": "sequence_ratio", "reduction": "seq-mean-token-mean"},
    ),
    "red_weight": ("rec", {"weight": "advantage"}),
    # arXiv 2506.20520 and OPMD, as regularised REINFORCE
    "rep_asymre": ("rec", {"regularizer": "forward_kl"}),
    "rep_opmd": ("rec", {"regularizer": "k2"}),
    # arXiv 2504.02546: no ratio; its scaled advantages are group_advantages(estimator="gpg")
    "gpg": ("rec", {}),
}
