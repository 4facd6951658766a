"""group_advantages: every estimator file against its own reference, and the rules that hold for all of them."""

import dataclasses
import math
import os
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest
import torch
from torch import Tensor

from repo_ops.advantages import Estimator, Rows, estimator_names, group_advantages, soft_overlong_penalty
from repo_ops.advantages.estimators import get_estimator
from repo_ops.advantages.estimators.red_drop import balanced
from repo_ops.advantages.rows import numbered, rows_of

NAMES = estimator_names()
VECTORS = [
    pytest.param(name, *vector, id=f"{name}-{i}")
    for name in NAMES
    for i, vector in enumerate(import_module(f"repo_ops.advantages.estimators.{name}").VECTORS)
]
# No signal where all rewards are equal. The rest say in their file why they differ: a baseline that is not the group's.
BASELINE_OF_THE_GROUP = sorted(set(NAMES) - {"remax", "asymre"})
REFUSE_MIXED = {"remax", "passk", "passk_analytic"}


def module(name):
    return import_module(f"repo_ops.advantages.estimators.{name}")


def run(name, rewards, group_ids, lengths=None, **arguments):
    """float64 on lists."""
    return group_advantages(
        torch.as_tensor(rewards, dtype=torch.float64),
        torch.as_tensor(group_ids),
        estimator=name,
        lengths=None if lengths is None else torch.as_tensor(lengths),
        **arguments,
    )


def random_case(name, seed):
    """Hyper-parameters and a batch: groups of 1 to about 6 rows in no order, half the rewards on a grid with ties."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(module(name), "random_case"):
        return module(name).random_case(generator)
    count = int(torch.randint(2, 25, (), generator=generator))
    rewards = torch.rand(count, generator=generator, dtype=torch.float64)
    rewards = torch.where(torch.rand(count, generator=generator) < 0.5, rewards, (rewards * 3).round() / 3)
    group_ids = torch.randint(-3, 3, (count,), generator=generator) * 1000
    lengths = torch.randint(0, 9, (count,), generator=generator)
    vectors = module(name).VECTORS
    return vectors[seed % len(vectors)][0], rewards.tolist(), group_ids.tolist(), lengths.tolist()


def rows_only(hyper, index):
    """Hyper-parameters for the rows `index`: those that hold a value a row are cut."""
    return {key: x[index] if isinstance(x, Tensor) and x.dim() else x for key, x in hyper.items()}


def reference(name, hyper, rewards, group_ids, lengths):
    return module(name).reference(get_estimator(name, **hyper), rewards, group_ids, lengths)


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-11)


class TestEveryFile:
    def test_names(self):
        assert NAMES == [
            "asymre", "bnpo", "dr_grpo", "gpg", "grpo", "opmd", "opo", "passk", "passk_analytic", "red_drop",
            "red_weight", "reinforce_pp", "reinforce_pp_baseline", "remax", "rloo",
        ]  # fmt: skip

    @pytest.mark.parametrize(("name", "hyper", "rewards", "group_ids", "lengths", "expected"), VECTORS)
    def test_vectors(self, name, hyper, rewards, group_ids, lengths, expected):
        close(run(name, rewards, group_ids, lengths, **hyper), expected)
        close(torch.tensor(reference(name, hyper, rewards, group_ids, lengths), dtype=torch.float64), expected)

    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("name", NAMES)
    def test_reference(self, name, seed):
        hyper, rewards, group_ids, lengths = random_case(name, seed)
        close(run(name, rewards, group_ids, lengths, **hyper), reference(name, hyper, rewards, group_ids, lengths))

    @pytest.mark.parametrize("name", NAMES)
    def test_is_documented(self, name):
        source = module(name)
        assert "A =" in source.__doc__
        assert "arXiv:" in source.__doc__
        assert dataclasses.is_dataclass(source.Estimator)
        assert source.Estimator.__dataclass_params__.frozen

    @pytest.mark.parametrize("name", NAMES)
    def test_every_hyper_parameter_changes_something_or_is_refused(self, name):
        other = {
            "normalize": [True, False], "scale": ["batch", "none"], "unbiased": [False], "eps": [0.7], "shift": [0.3],
            "group_of_one": ["reward"], "alpha": ["nonzero_rewards", 3.0], "f_norm": [3.0], "tau": [0.3], "k": [1, 4],
            "max_weight": [0.1], "min_value": [-3.0], "max_value": [3.0], "temp": [0.2], "greedy_rewards": [0.9],
            "keep": [torch.arange(8) % 2 == 0], "generator": [],  # the generator: TestRedDrop
        }  # fmt: skip
        ids, lengths = [0, 0, 0, 1, 1, 1, 1, 2], [3, 1, 2, 4, 2, 2, 1, 5]
        rewards = [1.0, 0.0, 0.5, 0.25, 0.75, 0.5, 0.0, 0.25]
        base = {"k": {"k": 2}, "greedy_rewards": {"greedy_rewards": 0.1}, "keep": {"keep": torch.ones(8, dtype=bool)}}
        fields = [field.name for field in dataclasses.fields(module(name).Estimator)]
        hyper = {key: x for field in fields for key, x in base.get(field, {}).items()}
        if name == "passk_analytic":
            rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        before = run(name, rewards, ids, lengths, **hyper)
        for field in fields:
            if field == "eps" and name == "red_drop":
                hyper = {**hyper, "normalize": True}
                before = run(name, rewards, ids, lengths, **hyper)
            changed = [run(name, rewards, ids, lengths, **{**hyper, field: value}) for value in other[field]]
            assert all(not torch.equal(after, before) for after in changed if len(changed) == 1), field
            assert not changed or any(not torch.equal(after, before) for after in changed), field


class TestEveryEstimator:
    """Properties that no estimator may break."""

    @pytest.mark.parametrize("name", NAMES)
    def test_order_and_names_of_groups_do_not_matter(self, name):
        for seed in range(4):
            hyper, rewards, group_ids, lengths = random_case(name, seed)
            expected = run(name, rewards, group_ids, lengths, **hyper)
            order = torch.randperm(len(rewards))
            renamed = torch.tensor([5, -7, 2**40, 0, 1, -(2**40), 9])[numbered(torch.tensor(group_ids))]
            got = run(
                name,
                torch.tensor(rewards, dtype=torch.float64)[order],
                renamed[order],
                None if lengths is None else torch.tensor(lengths)[order],
                **rows_only(hyper, order),
            )
            close(got, expected[order])

    @pytest.mark.parametrize("name", NAMES)
    def test_split_treats_replayed_rows_as_a_batch_of_their_own(self, name):
        for seed in range(6):
            hyper, rewards, group_ids, lengths = random_case(name, seed)
            off = torch.rand(len(rewards)) < 0.4
            got = run(name, rewards, group_ids, lengths, off_policy=off, **hyper)
            for kind in (off, ~off):
                index = kind.nonzero()[:, 0]
                pick = lambda values, index=index: [values[i] for i in index]  # noqa: E731
                alone = reference(
                    name,
                    rows_only(hyper, index),
                    pick(rewards),
                    pick(group_ids),
                    None if lengths is None else pick(lengths),
                )
                close(got[index], alone)

    @pytest.mark.parametrize("name", NAMES)
    def test_mixed_treats_replayed_rows_like_the_others_or_says_why_not(self, name):
        hyper, rewards, group_ids, lengths = random_case(name, 3)
        off = torch.rand(len(rewards)) < 0.4
        if name in REFUSE_MIXED:
            with pytest.raises(
                ValueError, match=f"mode: expected 'split' with estimator '{name}', got 'mixed'; .{{20}}"
            ):
                run(name, rewards, group_ids, lengths, off_policy=off, mode="mixed", **hyper)
            return
        got = run(name, rewards, group_ids, lengths, off_policy=off, mode="mixed", **hyper)
        assert torch.equal(got, run(name, rewards, group_ids, lengths, **hyper))
        assert not torch.equal(got, run(name, rewards, group_ids, lengths, off_policy=off, **hyper))

    @pytest.mark.parametrize("name", NAMES)
    def test_a_row_without_reward_is_as_if_it_were_not_there(self, name):
        for seed in range(4):
            hyper, rewards, group_ids, lengths = random_case(name, seed)
            missing = torch.rand(len(rewards)) < 0.3
            missing[0] = True
            values = torch.tensor(rewards, dtype=torch.float64).masked_fill(missing, math.nan)
            got = run(name, values, group_ids, lengths, **hyper)
            assert torch.equal(got[missing], torch.zeros(int(missing.sum()), dtype=torch.float64))
            index = (~missing).nonzero()[:, 0]
            expected = run(
                name,
                values[index],
                torch.tensor(group_ids)[index],
                None if lengths is None else torch.tensor(lengths)[index],
                **rows_only(hyper, index),
            )
            close(got[index], expected)

    @pytest.mark.parametrize("name", NAMES)
    def test_no_reward_at_all(self, name):
        hyper, rewards, group_ids, lengths = random_case(name, 0)
        got = run(name, [math.nan] * len(rewards), group_ids, lengths, **hyper)
        assert torch.equal(got, torch.zeros(len(rewards), dtype=torch.float64))

    @pytest.mark.parametrize("name", NAMES)
    def test_no_rows(self, name):
        hyper = rows_only(random_case(name, 0)[0], slice(0, 0))
        assert run(name, [], torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), **hyper).shape == (0,)

    @pytest.mark.parametrize("reward", [0.7, 0.1, 1 / 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", BASELINE_OF_THE_GROUP)
    def test_equal_rewards_are_no_signal_at_all(self, name, dtype, reward):
        # 7 rows: a mean of 7 equal rewards is rounded, and 1e-8 under a root would turn an ulp into an advantage
        hyper = {"k": 2} if name == "passk_analytic" else {}
        if name == "red_drop":
            hyper = {"generator": torch.Generator().manual_seed(0), "normalize": True}
        rewards = torch.full((7,), 1.0 if name == "passk_analytic" else reward, dtype=dtype)
        got = group_advantages(
            rewards,
            torch.tensor([0, 0, 0, 0, 0, 1, 1]),
            estimator=name,
            lengths=torch.arange(7),
            **hyper,
        )
        assert torch.equal(got, torch.zeros(7, dtype=dtype))

    @pytest.mark.parametrize("name", BASELINE_OF_THE_GROUP)
    def test_a_single_replay_has_no_advantage(self, name):
        hyper = {"passk_analytic": {"k": 2}, "red_drop": {"generator": torch.Generator()}}.get(name, {})
        off = torch.tensor([False, False, False, True])
        got = run(name, [1.0, 0.0, 0.0, 1.0], [0, 0, 0, 0], [3, 2, 1, 4], off_policy=off, **hyper)
        assert got[3] == 0
        assert got[0] > 0

    @pytest.mark.parametrize("name", sorted(set(NAMES) - {"passk_analytic", "bnpo"}))
    def test_an_offset_of_all_rewards_costs_no_digits(self, name):
        # 2**30 is a float32's largest unit of 64: computed in float32, nothing would be left of these rewards
        hyper, _, group_ids, lengths = random_case(name, 5)
        rewards = torch.randint(5, (len(group_ids),)).double()
        shifted = {**hyper, **({"greedy_rewards": hyper["greedy_rewards"] + 2**30} if name == "remax" else {})}
        if name == "gpg":
            shifted = hyper = {"alpha": "usable_groups"}
        if hyper.get("group_of_one") == "reward":
            shifted = hyper = {**hyper, "group_of_one": "zero"}
        expected = run(name, rewards, group_ids, lengths, **hyper)
        got = run(name, rewards + 2**30, group_ids, lengths, **shifted)
        # a scaled reward is rounded to 2**-22; those that only subtract are exact
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 if name in ("opmd", "remax") else 1e-10)

    @pytest.mark.parametrize("name", NAMES)
    def test_rewards_are_not_changed_and_get_no_graph(self, name):
        hyper, rewards, group_ids, lengths = random_case(name, 1)
        values = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)
        got = group_advantages(
            values,
            torch.tensor(group_ids),
            estimator=name,
            lengths=None if lengths is None else torch.tensor(lengths),
            **hyper,
        )
        assert not got.requires_grad
        assert values.tolist() == rewards

    @pytest.mark.parametrize("name", NAMES)
    def test_never_asks_the_device_for_a_size(self, name):
        # on the meta device there are no values, so anything that would wait for them raises
        hyper, rewards, _, _ = random_case(name, 2)
        if name == "red_drop":
            hyper = {"generator": torch.Generator()}
        hyper = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in hyper.items()}
        got = group_advantages(
            torch.empty(len(rewards), device="meta"),
            torch.empty(len(rewards), dtype=torch.long, device="meta"),
            off_policy=torch.empty(len(rewards), dtype=torch.bool, device="meta"),
            estimator=name,
            lengths=torch.empty(len(rewards), dtype=torch.long, device="meta"),
            **hyper,
        )
        assert got.shape == (len(rewards),)
        assert got.dtype == torch.float32


class TestDtypes:
    REWARDS = (1.0, 0.0, 0.5, 0.25)

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.int64, torch.float32),
        ],
    )
    def test_output(self, dtype, expected):
        rewards = torch.tensor([3, 1, 2, 2] if dtype == torch.int64 else self.REWARDS).to(dtype)
        got = group_advantages(rewards, torch.zeros(4, dtype=torch.int32))
        truth = group_advantages(rewards.double(), torch.zeros(4, dtype=torch.int32))
        assert got.dtype == expected
        assert torch.equal(got, truth.to(expected))

    def test_float32_is_the_rounded_truth_in_any_order(self):
        rewards = torch.rand(64)
        ids = torch.randint(8, (64,))
        expected = group_advantages(rewards, ids)
        for _ in range(5):
            order = torch.randperm(64)
            assert torch.equal(group_advantages(rewards[order], ids[order]), expected[order])


class TestGrpo:
    def test_the_docstring_in_pytorch(self):
        rewards, off = torch.rand(12, dtype=torch.float64), torch.arange(12) % 3 == 0
        got = group_advantages(rewards, torch.zeros(12, dtype=torch.long), off_policy=off)
        for kind in (off, ~off):
            r = rewards[kind]
            torch.testing.assert_close(got[kind], (r - r.mean()) / (r.std() + 1e-4))

    def test_batch_scale_is_trls(self):
        rewards, ids = torch.rand(12, dtype=torch.float64), torch.arange(12) // 4
        got = group_advantages(rewards, ids, scale="batch")
        mean = rewards.view(3, 4).mean(1).repeat_interleave(4)
        torch.testing.assert_close(got, (rewards - mean) / (rewards.std() + 1e-4))

    def test_no_eps_is_no_zero_by_zero(self):
        got = run("grpo", [0.7, 0.7, 1.0, 0.0], [0, 0, 1, 1], eps=0.0)
        close(got, [0.0, 0.0, math.sqrt(0.5), -math.sqrt(0.5)])


class TestBnpo:
    def test_parts_are_averaged(self):
        parts = torch.rand(12, 3, dtype=torch.float64)
        ids = torch.arange(12) // 4
        got = group_advantages(parts, ids, estimator="bnpo")
        each = [group_advantages(parts[:, k], ids, estimator="bnpo") for k in range(3)]
        close(got, sum(each) / 3)

    def test_a_part_that_is_always_zero_adds_nothing_and_no_nan(self):
        parts = torch.stack([torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), torch.zeros(6)], 1).double()
        ids = torch.tensor([0, 0, 0, 1, 1, 1])
        close(
            group_advantages(parts, ids, estimator="bnpo"),
            group_advantages(parts[:, 0], ids, estimator="bnpo") / 2,
        )

    def test_a_missing_part_counts_as_no_advantage_in_that_part(self):
        parts = torch.tensor([[1.0, math.nan], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        close(group_advantages(parts, torch.zeros(3, dtype=torch.long), estimator="bnpo"), [1 / 6, -1 / 12, -1 / 12])

    def test_rounding_of_equal_shares_is_not_a_fit(self):
        # three prompts of p = 1/3, summed in other orders; a variance of 1e-34 would fit a needle with weights near 0
        rewards = [0.1, 0.2, 0.7, 0.7, 0.1, 0.2, 0.2, 0.7, 0.1]
        got = run("bnpo", rewards, [0, 0, 0, 1, 1, 1, 2, 2, 2])
        close(got, [r - 1 / 3 for r in rewards])

    def test_all_right_and_all_wrong_prompts(self):
        got = run("bnpo", [1.0] * 3 + [0.0] * 3 + [1.0, 0.0, 0.0], [0] * 3 + [1] * 3 + [2] * 3)
        assert torch.equal(got[:6], torch.zeros(6, dtype=torch.float64))
        assert got.isfinite().all()
        assert got[6] > 0


class TestRedDrop:
    def test_drops_as_many_negatives_as_outnumber(self):
        # group 0: one positive of 5; group 1: 3 positives of 4, nothing to drop
        rewards = torch.tensor([1.0, 0.0, 0.1, 0.2, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        ids = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
        rows = rows_of(rewards, ids, torch.zeros(9, dtype=torch.bool), None)
        kept = balanced(rows, torch.tensor([0.0, 0.5, 0.1, 0.9, 0.7, 0.2, 0.3, 0.4, 0.6]))
        assert kept.tolist() == [True, False, True, False, False, True, True, True, True]

    def test_dropped_rows_have_no_advantage_and_no_part_in_the_mean(self):
        rewards, ids = [1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]
        dropped = torch.zeros(4)
        for seed in range(300):
            got = run("red_drop", rewards, ids, generator=torch.Generator().manual_seed(seed))
            assert sorted(got.tolist()) == [-0.5, 0.0, 0.0, 0.5]
            dropped += got == 0
        # each of the three negatives goes in two of three draws; five standard deviations
        assert dropped[0] == 0
        assert ((dropped[1:] - 200).abs() < 5 * math.sqrt(300 * 2 / 9)).all()

    def test_the_generator_decides(self):
        rewards, ids = torch.rand(40).tolist(), [0] * 40
        one, again, two = (
            run("red_drop", rewards + [9.0] * 3, [*ids, 0, 0, 0], generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, again)
        assert not torch.equal(one, two)


class TestOwnEstimator:
    def test_a_function_of_rows(self):
        def best_only(rows: Rows) -> Tensor:
            return (rows.rewards == rows.groups.largest(rows.rewards)).double()

        got = run(best_only, [1.0, 3.0, math.nan, 3.0, 2.0], [0, 0, 0, 1, 1])
        assert got.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]

    def test_an_object_with_settings(self):
        @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
        class Scaled(Estimator):
            factor: float

            def __call__(self, rows: Rows) -> Tensor:
                return self.factor * rows.groups.deviation(rows.rewards)

        close(run(Scaled(factor=4.0), [1.0, 0.0], [0, 0]), [2.0, -2.0])

    def test_one_file_is_one_estimator(self, tmp_path, monkeypatch):
        from repo_ops.advantages import estimators

        source = """
            from dataclasses import dataclass
            from repo_ops.advantages import base

            @dataclass(frozen=True, kw_only=True, eq=False)
            class Estimator(base.Estimator):
                by: float = 2.0

                def __call__(self, rows):
                    return rows.rewards * self.by
        """
        (tmp_path / "times.py").write_text(textwrap.dedent(source))
        monkeypatch.setattr(estimators, "__path__", [*estimators.__path__, str(tmp_path)])
        assert "times" in estimator_names()
        close(run("times", [1.0, 2.0], [0, 0], by=3.0), [3.0, 6.0])

    def test_a_result_of_another_shape(self):
        with pytest.raises(ValueError, match=r"estimator's result: expected shape \[2\] like rewards, got \[1\]"):
            run(lambda rows: rows.rewards[:1], [1.0, 0.0], [0, 0])


ROWS, IDS = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])


class TestRefuses:
    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"rewards": [1.0, 0.0]}, TypeError, "rewards: expected a tensor, got list; wrap it"),
            (
                {"rewards": ROWS.view(2, 1)},
                ValueError,
                r"rewards: expected shape \[B\], got \[2, 1\]; add the parts up",
            ),
            ({"rewards": torch.tensor(1.0)}, ValueError, r"rewards: expected shape \[B\], got \[\]"),
            (
                {"rewards": torch.zeros(2, 0), "estimator": "bnpo"},
                ValueError,
                r"rewards: expected shape \[B\] or \[B, K\], got \[2, 0\]",
            ),
            ({"rewards": ROWS.bool()}, TypeError, "rewards: expected a floating or integer dtype, got torch.bool"),
            ({"rewards": ROWS / 0}, ValueError, "rewards: expected finite values, or NaN for no reward; clip"),
            ({"group_ids": [0, 0]}, TypeError, r"group_ids: expected a tensor of shape \[2\] like rewards, got list"),
            ({"group_ids": IDS[:1]}, ValueError, r"group_ids: expected shape \[2\] like rewards, got \[1\]"),
            ({"group_ids": IDS.float()}, TypeError, "group_ids: expected an integer dtype, got torch.float32"),
            ({"group_ids": IDS.bool()}, TypeError, "group_ids: expected an integer dtype, got torch.bool"),
            ({"group_ids": IDS.to("meta")}, ValueError, "group_ids: expected device cpu like rewards, got meta"),
            ({"off_policy": IDS}, TypeError, "off_policy: expected a bool dtype, got torch.int64"),
            ({"off_policy": IDS.bool()[:1]}, ValueError, r"off_policy: expected shape \[2\] like rewards, got \[1\]"),
            ({"mode": "mixed"}, ValueError, r"off_policy: expected \[B\] bool with mode='mixed', got None; mark"),
            ({"mode": "both"}, ValueError, "mode: expected 'split' or 'mixed', got 'both'"),
            ({"estimator": "opo"}, ValueError, "lengths: expected .* estimator 'opo' weighs by, got None; pass"),
            ({"estimator": "reinforce_pp"}, ValueError, "lengths: expected"),
            ({"estimator": "reinforce_pp_baseline"}, ValueError, "lengths: expected"),
            ({"lengths": IDS[:1]}, ValueError, r"lengths: expected shape \[2\] like rewards, got \[1\]"),
            ({"lengths": IDS.float()}, TypeError, "lengths: expected an integer dtype, got torch.float32"),
            ({"lengths": IDS - 1}, ValueError, "lengths: expected values >= 0; give each"),
            ({"estimator": "gpro"}, ValueError, "estimator: expected one of .*, got 'gpro'; did you mean 'grpo'"),
            ({"estimator": 3}, TypeError, "estimator: expected a name, an Estimator or a function of Rows, got 3"),
            ({"estimator": Estimator}, TypeError, "make an instance of a class first"),
            ({"epsilon": 1.0}, ValueError, "epsilon: unknown to estimator 'grpo', which takes .*; did you mean 'eps'"),
            ({"estimator": "dr_grpo", "eps": 1.0}, ValueError, "eps: unknown to .* which takes no hyper-parameters"),
            ({"estimator": lambda rows: rows.rewards, "eps": 1.0}, ValueError, "eps: hyper-parameters go with"),
            ({"estimator": "remax"}, ValueError, "greedy_rewards: required by estimator 'remax', got nothing; pass"),
            ({"estimator": "passk_analytic"}, ValueError, "k: required by estimator 'passk_analytic', got nothing"),
            ({"eps": -1.0}, ValueError, "eps: expected >= 0, got -1.0"),
            ({"eps": math.nan}, ValueError, "eps: expected >= 0, got nan"),
            ({"scale": "row"}, ValueError, "scale: expected one of 'group', 'batch', 'none', got 'row'"),
            ({"group_of_one": "nan"}, ValueError, "group_of_one: expected one of 'zero', 'reward', got 'nan'"),
            (
                {"normalize": False, "scale": "batch"},
                ValueError,
                "scale: expected 'group' or 'none' with normalize=False",
            ),
            ({"estimator": "rloo", "group_of_one": 1}, ValueError, "group_of_one: expected one of"),
            ({"estimator": "opo", "lengths": IDS, "group_of_one": 1}, ValueError, "group_of_one: expected one of"),
            ({"estimator": "reinforce_pp", "lengths": IDS, "eps": 0.0}, ValueError, "eps: expected > 0, got 0.0"),
            ({"estimator": "opmd", "tau": 0.0}, ValueError, "tau: expected > 0, got 0.0"),
            ({"estimator": "red_weight", "temp": -1.0}, ValueError, "temp: expected > 0, got -1.0"),
            ({"estimator": "gpg", "alpha": "verl"}, ValueError, "alpha: expected one of 'usable_groups', 'nonzero_rew"),
            ({"estimator": "gpg", "f_norm": 0.0}, ValueError, "f_norm: expected > 0, got 0.0"),
            ({"estimator": "gpg", "alpha": -1.0}, ValueError, "alpha: expected > 0, got -1.0"),
            ({"estimator": "passk_analytic", "k": 0}, ValueError, "k: expected > 0, got 0"),
            ({"estimator": "passk_analytic", "k": 1.5}, TypeError, "k: expected an integer, got 1.5"),
            (
                {"estimator": "passk_analytic", "k": 1, "rewards": ROWS / 2},
                ValueError,
                "rewards: expected 0 or 1 for 'passk_analytic', got 0.5; threshold",
            ),
            (
                {"estimator": "bnpo", "rewards": ROWS * 2},
                ValueError,
                r"rewards: expected values in \[0.0, 1.0\], got 2.0; set min_value and max_value",
            ),
            ({"estimator": "bnpo", "max_value": 0.0}, ValueError, "max_value: expected > min_value = 0.0, got 0.0"),
            ({"estimator": "bnpo", "max_weight": 0.0}, ValueError, "max_weight: expected > 0, got 0.0"),
            (
                {"estimator": "remax", "greedy_rewards": torch.zeros(3)},
                ValueError,
                r"greedy_rewards: expected shape \[2\] like rewards, got \[3\]; give every row",
            ),
            ({"estimator": "remax", "greedy_rewards": math.nan}, ValueError, "greedy_rewards: expected finite numbers"),
            ({"estimator": "red_drop"}, ValueError, "generator: expected either generator or keep, got neither; pass"),
            (
                {"estimator": "red_drop", "keep": IDS.bool(), "generator": torch.Generator()},
                ValueError,
                "generator: expected either generator or keep, got both",
            ),
            ({"estimator": "red_drop", "keep": IDS}, TypeError, "keep: expected a bool tensor, got torch.int64"),
            (
                {"estimator": "red_drop", "keep": torch.ones(3, dtype=torch.bool)},
                ValueError,
                r"keep: expected shape \[2\] like rewards, got \[3\]",
            ),
        ],
    )
    def test_names_the_argument(self, changed, error, message):
        arguments = {"rewards": ROWS, "group_ids": IDS, **changed}
        with pytest.raises(error, match=message) as caught:
            group_advantages(arguments.pop("rewards"), arguments.pop("group_ids"), **arguments)
        assert "\n" not in str(caught.value)


class TestOverlong:
    def test_by_hand(self):
        got = soft_overlong_penalty(torch.tensor([[0, 6], [7, 10]]), max_length=10, cache=4)
        assert got.tolist() == [[0.0, 0.0], [-0.25, -1.0]]
        assert got.dtype == torch.float32

    @pytest.mark.parametrize("cache", [0, 11])
    def test_refuses_a_cache_outside_the_limit(self, cache):
        with pytest.raises(ValueError, match=f"cache: expected within .1, max_length = 10., got {cache}"):
            soft_overlong_penalty(torch.tensor([1]), max_length=10, cache=cache)

    @pytest.mark.parametrize("lengths", [torch.tensor([1.0]), [1]])
    def test_refuses_lengths_that_are_not_integers(self, lengths):
        with pytest.raises(TypeError, match="lengths: expected an integer tensor of token counts, got"):
            soft_overlong_penalty(lengths, max_length=10, cache=4)


KERNEL = """
    import os, torch
    os.environ["TRITON_INTERPRET"] = "1"
    from repo_ops.advantages import group_advantages
    from repo_ops.advantages.estimators import get_estimator
    from repo_ops.advantages.fused import on_kernel

    worst = 0.0
    # the interpreter is slow: no row, and 13 rows of up to 8 groups, enough for every kind of group
    for hyper in ({}, {"scale": "none"}, {"unbiased": False, "eps": 1e-6}):
        for count in (0, 13):
            rewards = (torch.rand(count) * 4).round() / 4
            rewards[torch.rand(count) < 0.1] = float("nan")
            ids = torch.randint(-2, 6, (count,)) * 1000
            off = torch.rand(count) < 0.4
            for mode, flags in (("split", off), ("mixed", off), ("split", None)):
                got = on_kernel(get_estimator("grpo", **hyper), rewards, ids, flags, mode)
                expected = group_advantages(rewards.double(), ids, off_policy=flags, mode=mode, **hyper)
                assert got.dtype == torch.float32
                worst = max(worst, *(got - expected).abs().tolist(), 0.0)
                assert torch.equal(got == 0, expected == 0)
    print(worst)
"""


class TestKernel:
    def test_agrees_with_pytorch_in_the_interpreter(self):
        # a process of its own: the interpreter is chosen when triton is imported
        pytest.importorskip("triton")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        out = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KERNEL)], capture_output=True, text=True, env=environment, cwd="/"
        )
        assert out.returncode == 0, out.stderr
        assert float(out.stdout) < 2e-6

    @pytest.mark.gpu
    def test_is_what_runs_on_a_gpu(self):
        rewards, ids = (torch.rand(64) * 4).round() / 4, torch.randint(8, (64,))
        off = torch.rand(64) < 0.4
        expected = group_advantages(rewards.double(), ids, off_policy=off)
        got = group_advantages(rewards.cuda(), ids.cuda(), off_policy=off.cuda())
        torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-6, atol=2e-6)

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", NAMES)
    def test_every_estimator_on_a_gpu_without_a_sync(self, name):
        hyper, rewards, group_ids, lengths = random_case(name, 2)
        expected = run(name, rewards, group_ids, lengths, **hyper)
        on_gpu = {key: x.cuda() if isinstance(x, Tensor) else x for key, x in hyper.items()}
        values = torch.tensor(rewards, dtype=torch.float64).cuda()
        ids = torch.tensor(group_ids).cuda()
        tokens = None if lengths is None else torch.tensor(lengths).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = group_advantages(values, ids, estimator=name, lengths=tokens, **on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        close(got.cpu(), expected)
