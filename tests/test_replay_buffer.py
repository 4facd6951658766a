"""ReplayBuffer: what is drawn, when, and that a saved buffer goes on as if it had never stopped."""

import io
import json
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from repo_ops.replay import ReplayBuffer, Sample, home_rank, strategy_names

# scores, oldest to newest, with ties at both ends
SCORES = [0.3, 1.0, 0.0, 1.0, 0.5, 0.0, 0.2, 0.9]


def sample(token, *, reward=0.0, version=0, rewards=None):
    return Sample((token,), (-0.5,), reward, {} if rewards is None else rewards, version, 1.0, True)


def filled(strategy, num_replays, **options):
    buffer = ReplayBuffer(8, strategy, num_replays, 1, **options)
    buffer.push("p", [sample(i, reward=score) for i, score in enumerate(SCORES)])
    return buffer


def tokens(samples):
    return [s.token_ids[0] for s in samples]


class TestDraw:
    @pytest.mark.parametrize(
        ("strategy", "num_replays", "expected"),
        [
            ("full_scope", 2, list(range(8))),
            ("full_scope", None, list(range(8))),
            ("recency", 3, [5, 6, 7]),
            ("reward", 3, [1, 3, 7]),
            ("variance", 2, [1, 2]),
            ("variance", 3, [1, 2, 3]),
            ("variance", 4, [1, 2, 3, 5]),
        ],
    )
    def test_takes_what_the_strategy_says(self, strategy, num_replays, expected):
        assert tokens(filled(strategy, num_replays).draw("p")) == expected

    @pytest.mark.parametrize("strategy", ["full_scope", "random", "recency", "reward", "variance"])
    def test_returns_all_while_fewer_than_num_replays_are_stored(self, strategy):
        assert sorted(tokens(filled(strategy, 50).draw("p"))) == list(range(8))

    def test_starts_at_min_size(self):
        buffer = ReplayBuffer(4, "recency", 2, 3)
        assert buffer.draw("p") == []
        buffer.push("p", [sample(0), sample(1)])
        assert buffer.draw("p") == []
        assert buffer.metrics(0)["replay/drawn"] == 0
        buffer.push("p", [sample(2)])
        assert tokens(buffer.draw("p")) == [1, 2]

    def test_each_prompt_has_its_own_ring_and_its_own_k(self):
        buffer = ReplayBuffer(4, "full_scope", None, 1)
        buffer.push("a", [sample(i) for i in range(6)])
        buffer.push("b", [sample(9)])
        assert tokens(buffer.draw("a")) == [2, 3, 4, 5]  # first in, first out
        assert tokens(buffer.draw("b")) == [9]
        assert buffer.draw("never seen") == []
        assert len(buffer) == 5

    def test_a_step_replays_nothing_of_its_own(self):
        # the paper's setting: capacity 16, min_size 16, 8 completions a visit, so that the third visit replays
        buffer = ReplayBuffer(16, "recency", 8, 16)
        drawn = []
        for version in range(4):
            drawn.append(sorted({s.version for s in buffer.draw("p", version=version)}))
            buffer.push("p", [sample(i, version=version) for i in range(8)])
        assert drawn == [[], [], [1], [2]]

    def test_push_before_draw_is_a_mistake_that_version_uncovers(self):
        buffer = ReplayBuffer(4, "recency", 2, 1)
        buffer.push("p", [sample(0, version=7)])
        with pytest.raises(
            ValueError, match=r"version: expected later than every stored sample \(newest 7\), got 7; draw"
        ):
            buffer.draw("p", version=7)
        assert tokens(buffer.draw("p", version=8)) == [0]

    def test_sum_of_parts_scores_by_the_unweighted_sum(self):
        parts = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 3.0}, {"a": 2.0, "b": 0.5}]
        buffer = ReplayBuffer(4, "reward", 2, 1, score="sum_of_parts")
        buffer.push("p", [sample(i, reward=-i, rewards=part) for i, part in enumerate(parts)])
        assert tokens(buffer.draw("p")) == [1, 2]

    def test_parts_in_another_order_are_the_same_score(self):
        # 0.1 + 0.2 + 0.3 is 0.6000000000000001 or 0.6, by the order; the older sample wins a true tie
        buffer = ReplayBuffer(4, "reward", 1, 1, score="sum_of_parts")
        buffer.push(
            "p", [sample(0, rewards={"a": 0.3, "b": 0.2, "c": 0.1}), sample(1, rewards={"a": 0.1, "b": 0.2, "c": 0.3})]
        )
        assert tokens(buffer.draw("p")) == [0]


def chi_square(strategy, *, draws=4000, n=8, k=3):
    """Statistic of how often each of n samples is drawn; each draw is of a prompt of its own."""
    buffer = ReplayBuffer(n, strategy, k, 1, seed=20)
    count = Counter()
    for i in range(draws):
        buffer.push(f"prompt {i}", [sample(token) for token in range(n)])
        count.update(tokens(buffer.draw(f"prompt {i}")))
    assert sum(count.values()) == draws * k
    expected = draws * k / n
    # without replacement a draw's counts have covariance (1 - k/n) times that of k independent picks, times n/(n-1)
    return sum((count[token] - expected) ** 2 / expected for token in range(n)) / ((1 - k / n) * n / (n - 1))


# 0.999 quantile of chi-square with n - 1 = 7 degrees of freedom
CHI_SQUARE_7 = 24.32


class TestRandom:
    def test_is_uniform_over_samples(self):
        assert chi_square("random") < CHI_SQUARE_7

    def test_the_uniformity_test_can_fail(self):
        def slightly_biased(samples, scores, k, rng):
            # one draw in ten takes the newest instead
            return (
                list(range(len(samples) - k, len(samples)))
                if rng.random() < 0.1
                else rng.sample(range(len(samples)), k)
            )

        assert chi_square(slightly_biased) > CHI_SQUARE_7

    def test_is_uniform_over_repeated_draws_of_one_prompt(self):
        buffer = filled("random", 3, seed=1)
        count = Counter()
        for _ in range(4000):
            count.update(tokens(buffer.draw("p")))
        statistic = sum((count[t] - 1500) ** 2 / 1500 for t in range(8)) / ((1 - 3 / 8) * 8 / 7)
        assert statistic < CHI_SQUARE_7

    def test_draws_distinct_samples(self):
        buffer = filled("random", 7)
        assert all(len(set(tokens(buffer.draw("p")))) == 7 for _ in range(50))

    def test_depends_on_the_seed_and_on_nothing_around_it(self):
        one, two, other = (filled("random", 3, seed=seed) for seed in (0, 0, 1))
        for buffer in (one, two, other):
            buffer.push("q", [sample(i) for i in range(8)])
        first = [tokens(one.draw("p")) for _ in range(5)]
        for _ in range(3):
            two.draw("q")  # another prompt's draws in between
        torch.manual_seed(1)
        assert [tokens(two.draw("p")) for _ in range(5)] == first
        assert [tokens(other.draw("p")) for _ in range(5)] != first


class TestMetrics:
    def test_counts_by_hand(self):
        buffer = ReplayBuffer(3, "recency", 2, 2)
        buffer.push("a", [sample(0, version=0), sample(1, version=0)])
        buffer.push("a", [sample(2, version=2), sample(3, version=2)])  # evicts sample 0
        buffer.push("b", [sample(4, version=3)])
        buffer.draw("a", version=4)  # samples 2 and 3
        buffer.draw("a", version=4)
        assert buffer.draw("b", version=4) == []
        assert buffer.metrics(5) == {
            "replay/size": 4.0,
            "replay/distinct_prompts": 2.0,
            "replay/distinct_groups": 3.0,  # a at versions 0 and 2, b at 3
            "replay/ready_prompts": 1.0,
            "replay/pushed": 5.0,
            "replay/evicted": 1.0,
            "replay/drawn": 4.0,
            "replay/age_steps_mean": (5 + 3 + 3 + 2) / 4,
            "replay/age_steps_p95": 5.0,
            "replay/age_steps_max": 5.0,
            "replay/times_reused_mean": (0 + 2 + 2 + 0) / 4,
            "replay/times_reused_max": 2.0,
        }

    def test_an_evicted_sample_still_counts_as_drawn(self):
        buffer = ReplayBuffer(1, "recency", 1, 1)
        buffer.push("a", [sample(0)])
        buffer.draw("a")
        buffer.push("a", [sample(1)])
        metrics = buffer.metrics(0)
        assert (metrics["replay/drawn"], metrics["replay/evicted"], metrics["replay/times_reused_max"]) == (1, 1, 0)

    def test_empty_buffer_is_all_zeros(self):
        metrics = ReplayBuffer(1, "recency", 1, 1).metrics(0)
        assert set(metrics.values()) == {0.0}
        assert all(isinstance(value, float) for value in metrics.values())

    def test_refuses_a_version_before_the_samples(self):
        buffer = ReplayBuffer(1, "recency", 1, 1)
        buffer.push("a", [sample(0, version=4)])
        with pytest.raises(ValueError, match="version: expected the current policy version, got 3; a sample is newer"):
            buffer.metrics(3)

    def test_looking_is_not_drawing(self):
        buffer = filled("recency", 2)
        assert tokens(buffer.samples("p")) == list(range(8))
        assert buffer.samples("q") == []
        assert buffer.metrics(0)["replay/drawn"] == 0


def through_json(state):
    return json.loads(json.dumps(state))


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestState:
    @pytest.mark.parametrize("carry", [through_json, through_torch])
    @pytest.mark.parametrize("strategy", ["full_scope", "random", "recency", "reward", "variance"])
    def test_a_restart_changes_nothing(self, strategy, carry):
        def steps(buffer, versions):
            drawn = []
            for version in versions:
                for prompt in ("a", "b", "ünïcode\n"):
                    drawn.append(buffer.draw(prompt, version=version))
                    rewards = [((version * 7 + i * 3) % 5) / 3 for i in range(3)]
                    buffer.push(
                        prompt, [sample(version * 10 + i, reward=r, version=version) for i, r in enumerate(rewards)]
                    )
                drawn.append(buffer.metrics(version))
            return drawn

        unbroken = ReplayBuffer(7, strategy, 3, 4, seed=5)
        steps(unbroken, range(6))
        resumed = ReplayBuffer(7, strategy, 3, 4, seed=5)
        steps(resumed, range(2))  # contents that loading must replace
        resumed.load_state_dict(carry(unbroken.state_dict()))
        assert resumed.state_dict() == unbroken.state_dict()
        assert steps(resumed, range(6, 12)) == steps(unbroken, range(6, 12))

    def test_a_state_is_a_copy(self):
        buffer = filled("recency", 2)
        state = buffer.state_dict()
        before = through_json(state)
        buffer.draw("p")
        buffer.push("p", [sample(99)])
        assert state == before

    @pytest.mark.parametrize(
        ("field", "changed"),
        [
            ("capacity_per_prompt", {"capacity_per_prompt": 9}),
            ("strategy", {"strategy": "random"}),
            ("num_replays", {"num_replays": 3}),
            ("min_size", {"min_size": 3}),
            ("seed", {"seed": 1}),
            ("score", {"score": "sum_of_parts"}),
        ],
    )
    def test_refuses_another_configuration(self, field, changed):
        settings = {"capacity_per_prompt": 8, "strategy": "recency", "num_replays": 2, "min_size": 2}
        buffer = ReplayBuffer(**{**settings, **changed})
        buffer.push("kept", [sample(0, rewards={"a": 1.0})])
        with pytest.raises(ValueError, match=f"^{field}: expected .* as in the saved state, got .*; resume with"):
            buffer.load_state_dict(ReplayBuffer(**settings).state_dict())
        assert tokens(buffer.samples("kept")) == [0]

    def test_refuses_something_else(self):
        with pytest.raises(ValueError, match="state: expected a ReplayBuffer state of format 1, got None"):
            filled("recency", 2).load_state_dict({"model": 1})

    def test_refuses_a_damaged_state(self):
        state = filled("recency", 2).state_dict()
        state["prompts"]["p"]["times_drawn"].pop()
        with pytest.raises(ValueError, match="got 8 samples and 7 counts; the file is damaged"):
            filled("recency", 2).load_state_dict(state)

    def test_another_number_of_ranks_changes_no_draw(self):
        prompts = [f"prompt {i}" for i in range(40)]

        def ranks(world_size):
            return [ReplayBuffer(6, "random", 2, 3, seed=3) for _ in range(world_size)]

        def steps(buffers, versions):
            drawn = {}
            for version in versions:
                for prompt in prompts:
                    buffer = buffers[home_rank(prompt, len(buffers))]
                    drawn[version, prompt] = buffer.draw(prompt, version=version)
                    buffer.push(prompt, [sample(version * 10 + i, version=version) for i in range(2)])
            return drawn

        one, three = ranks(1), ranks(3)
        assert steps(one, range(5)) == steps(three, range(5))
        states = [through_json(buffer.state_dict()) for buffer in three]
        two = ranks(2)
        for rank, buffer in enumerate(two):
            buffer.load_state_dicts(states, keep=lambda prompt, rank=rank: home_rank(prompt, 2) == rank)
        assert sum(map(len, two)) == sum(map(len, three)) == len(one[0])
        assert min(map(len, two)) > 0
        assert steps(two, range(5, 9)) == steps(one, range(5, 9))
        for name in ("replay/pushed", "replay/drawn", "replay/evicted"):
            assert sum(b.metrics(9)[name] for b in two) == one[0].metrics(9)[name]

    def test_refuses_a_prompt_that_two_ranks_hold(self):
        state = filled("recency", 2).state_dict()
        with pytest.raises(ValueError, match="states: expected each prompt in one state, got 'p' in two"):
            ReplayBuffer(8, "recency", 2, 1).load_state_dicts([state, state])


class TestHomeRank:
    def test_never_changes(self):
        # written down, because saved buffers are handed out by it: another value would leave prompts without their past
        assert [home_rank(f"What is {i} + 1?", 7) for i in range(10)] == [5, 4, 4, 5, 4, 2, 3, 6, 4, 6]
        assert [home_rank(prompt, 1000) for prompt in ("", "p", "ünïcode\n")] == [876, 935, 471]

    def test_spreads_prompts(self):
        count = Counter(home_rank(f"What is {i} + 1?", 4) for i in range(4000))
        # four standard deviations of a fair spread
        assert all(abs(count[rank] - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75) for rank in range(4))

    def test_takes_any_str(self):
        assert home_rank("\ud800 broken surrogate", 1) == 0

    def test_refuses_no_ranks(self):
        with pytest.raises(ValueError, match="world_size: expected >= 1, got 0"):
            home_rank("p", 0)


class TestOwnStrategy:
    def test_a_function_sees_samples_scores_k_and_rng(self):
        def longest(samples, scores, k, rng):
            return sorted(range(len(samples)), key=lambda i: -len(samples[i].token_ids))[:k]

        buffer = ReplayBuffer(4, longest, 1, 1)
        buffer.push("p", [sample(0), Sample((1, 2), (-1.0, -1.0), 0.0, {}, 0, 1.0, True)])
        assert [s.token_ids for s in buffer.draw("p")] == [(1, 2)]

    def test_settings_of_an_object_belong_to_the_saved_configuration(self):
        @dataclass(frozen=True)
        class Every:
            stride: int

            def __call__(self, samples, scores, k, rng):
                return list(range(0, len(samples), self.stride))[:k]

        state = ReplayBuffer(4, Every(2), 2, 1).state_dict()
        ReplayBuffer(4, Every(2), 2, 1).load_state_dict(state)
        with pytest.raises(ValueError, match=r"strategy: expected .*stride=2.* got .*stride=3"):
            ReplayBuffer(4, Every(3), 2, 1).load_state_dict(state)

    @pytest.mark.parametrize("indices", [[0, 0], [8], [-1]])
    def test_indices_are_checked(self, indices):
        buffer = filled(lambda samples, scores, k, rng: indices, 2)
        with pytest.raises(ValueError, match=r"strategy: expected distinct indices in \[0, 8\), got"):
            buffer.draw("p")
        assert buffer.metrics(0)["replay/drawn"] == 0

    def test_one_file_is_one_strategy(self):
        assert strategy_names() == ["full_scope", "random", "recency", "reward", "variance"]


class TestRefuses:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"capacity_per_prompt": 0}, ValueError, "capacity_per_prompt: expected >= 1, got 0"),
            ({"min_size": 0}, ValueError, "min_size: expected >= 1, got 0"),
            ({"min_size": 9}, ValueError, "min_size: expected at most capacity_per_prompt = 8, got 9; .* never start"),
            ({"num_replays": 0}, ValueError, "num_replays: expected >= 1, got 0; .* leave the buffer out"),
            ({"num_replays": None}, ValueError, "num_replays: expected >= 1, got None; only strategy 'full_scope'"),
            ({"num_replays": 1.5}, TypeError, "num_replays: expected an integer, got 1.5"),
            ({"seed": "x"}, TypeError, "seed: expected an integer, got 'x'"),
            ({"strategy": "recent"}, ValueError, "strategy: expected one of .* got 'recent'; did you mean 'recency'"),
            ({"strategy": "xyzzy"}, ValueError, "strategy: expected one of .* got 'xyzzy'$"),
            ({"strategy": "highest_k"}, ValueError, "the official code's 'highest_k' is 'reward' here"),
            ({"strategy": "max_variance_k"}, ValueError, "the official code's 'max_variance_k' is 'variance' here"),
            ({"strategy": "all"}, ValueError, "the official code's 'all' is 'full_scope' here"),
            ({"strategy": "none"}, ValueError, "to train without replay, leave the buffer out"),
            ({"strategy": 3}, TypeError, "strategy: expected a name or a function, got int"),
            ({"score": "advantage"}, ValueError, "score: expected 'reward' or 'sum_of_parts', got 'advantage'"),
        ],
    )
    def test_settings(self, settings, error, message):
        with pytest.raises(error, match=message) as caught:
            ReplayBuffer(
                **{"capacity_per_prompt": 8, "strategy": "recency", "num_replays": 2, "min_size": 2, **settings}
            )
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("prompt", [3, None, b"bytes", ["p"], torch.tensor(1)])
    def test_a_prompt_that_is_no_str(self, prompt):
        buffer = ReplayBuffer(8, "recency", 2, 2)
        for call in (lambda: buffer.push(prompt, []), lambda: buffer.draw(prompt), lambda: buffer.samples(prompt)):
            with pytest.raises(TypeError, match="prompt: expected a str, got"):
                call()

    def test_a_push_is_all_or_nothing(self):
        buffer = ReplayBuffer(8, "recency", 2, 2)
        with pytest.raises(TypeError, match="samples: expected Sample objects, got dict"):
            buffer.push("p", [sample(0), {"token_ids": [1]}])
        assert len(buffer) == 0

    def test_a_sample_without_parts_where_parts_are_the_score(self):
        buffer = ReplayBuffer(8, "reward", 2, 2, score="sum_of_parts")
        with pytest.raises(ValueError, match="rewards: expected at least one part, because score='sum_of_parts'"):
            buffer.push("p", [sample(0)])

    def test_an_empty_push_stores_no_prompt(self):
        buffer = ReplayBuffer(8, "recency", 2, 2)
        buffer.push("p", [])
        assert buffer.metrics(0)["replay/distinct_prompts"] == 0
