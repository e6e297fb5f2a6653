"""Rollouts share batches, end with an error instead of waiting forever, and keep their tokens."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.environment.pool import Pool
from posttrain.environment.rollouts import Generate, Rollouts, Sample
from posttrain.environment.trajectory import Trajectory, for_trl


class Echo:
    """A model that returns the last token plus one, and counts its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, prompts: list[list[int]]) -> list[Sample]:
        self.batches.append(len(prompts))
        return [Sample([prompt[-1] + 1], [-0.5]) for prompt in prompts]


async def count_up(rollouts: Rollouts, model: Generate, start: int, steps: int) -> int:
    for _ in range(steps):
        (start,), _ = await rollouts.generate(model, [start])
    return start


@given(st.lists(st.integers(0, 6), max_size=6))
def test_all_rollouts_share_each_batch(steps: list[int]) -> None:
    model, rollouts = Echo(), Rollouts()
    results = rollouts.run(*(count_up(rollouts, model, 10 * i, n) for i, n in enumerate(steps)))
    assert results == [10 * i + n for i, n in enumerate(steps)]
    longest = max(steps, default=0)
    assert model.batches == [sum(n > step for n in steps) for step in range(longest)]


# A rollout: own steps, then sub-rollouts, then own steps.
tree = st.recursive(
    st.builds(lambda n: (n, [], 0), st.integers(0, 3)),
    lambda children: st.tuples(
        st.integers(0, 3), st.lists(children, max_size=3), st.integers(0, 3)
    ),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.lists(tree, max_size=4))
def test_sub_rollouts_share_batches_with_all_others(trees: list[tuple]) -> None:  # type: ignore[type-arg]
    def depth(node: tuple) -> int:  # type: ignore[type-arg]
        before, children, after = node
        return before + max(map(depth, children), default=0) + after

    model, rollouts = Echo(), Rollouts()

    async def run(node: tuple) -> int:  # type: ignore[type-arg]
        before, children, after = node
        await count_up(rollouts, model, 0, before)
        inside = await rollouts.gather(*map(run, children))
        await count_up(rollouts, model, 0, after)
        return before + sum(inside) + after

    totals = rollouts.run(*map(run, trees))
    assert sum(model.batches) == sum(totals)
    # As few calls of the model as the longest path has: nothing waits for anything else.
    assert len(model.batches) == rollouts.batches == max(map(depth, trees), default=0)


def test_each_model_has_one_batch() -> None:
    first, second, rollouts = Echo(), Echo(), Rollouts()
    models = [first, second, first, second]
    rollouts.run(*(count_up(rollouts, model, 0, 2) for model in models))
    assert first.batches == second.batches == [2, 2]


def bad_model(kind: str) -> Generate:
    def model(prompts: list[list[int]]) -> Sequence[Sample]:
        if kind == "raises":
            raise RuntimeError("no memory")
        sample = Sample([1, 2], [0.0] if kind == "short" else [0.0, math.nan])
        return [sample] * (len(prompts) + (kind == "many"))

    return model


@pytest.mark.parametrize("kind", ["raises", "many", "short", "nan"])
@pytest.mark.parametrize("caught", [True, False])
def test_an_error_of_the_model_ends_the_run(kind: str, caught: bool) -> None:
    rollouts, model = Rollouts(), bad_model(kind)

    async def rollout() -> None:
        try:
            await count_up(rollouts, model, 0, 3)
        except Exception:
            if not caught:
                raise

    with pytest.raises((RuntimeError, ValueError), match=r"no memory|the model returned"):
        rollouts.run(rollout(), rollout())
    assert rollouts.run(count_up(rollouts, Echo(), 0, 1)) == [1]  # it can be used again


def test_an_error_of_a_rollout_ends_the_run_after_the_others() -> None:
    model, rollouts = Echo(), Rollouts()

    async def fails() -> int:
        await rollouts.generate(model, [0])
        raise KeyError("x")

    with pytest.raises(KeyError):
        rollouts.run(fails(), count_up(rollouts, model, 0, 3))
    assert model.batches == [2, 1, 1]


def test_a_cancelled_request_is_left_out() -> None:
    model, rollouts = Echo(), Rollouts()

    async def impatient() -> str:
        request = asyncio.ensure_future(rollouts.generate(model, [0]))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        return "cancelled"

    async def patient() -> int:
        await asyncio.sleep(0.01)  # not waiting: nothing is generated meanwhile
        return await count_up(rollouts, model, 0, 2)

    assert rollouts.run(impatient(), patient()) == ["cancelled", 2]
    assert model.batches == [1, 1]


def test_a_waiting_rollout_does_not_stop_the_others() -> None:
    model, rollouts = Echo(), Rollouts()

    async def slow(done: asyncio.Event) -> int:
        with rollouts.waiting():
            await done.wait()
        return await count_up(rollouts, model, 0, 1)

    async def both() -> list[int]:
        done = asyncio.Event()

        async def fast() -> int:
            result = await count_up(rollouts, model, 0, 3)
            done.set()
            return result

        return await rollouts.gather(slow(done), fast())

    assert rollouts.run(both()) == [[1, 3]]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_pool_lends_and_reuses(size: int) -> None:
    model, rollouts = Echo(), Rollouts()

    async def all() -> tuple[int, int]:
        pool = Pool(object, size, rollouts.waiting)
        in_use = most = 0

        async def one() -> None:
            nonlocal in_use, most
            async with pool.lease():
                in_use += 1
                most = max(most, in_use)
                await count_up(rollouts, model, 0, 2)
                in_use -= 1

        await rollouts.gather(*(one() for _ in range(5)))
        return most, pool.created

    assert rollouts.run(all()) == [(size, size)]
    assert sum(model.batches) == 10


def test_a_broken_environment_is_not_lent_again() -> None:
    async def run() -> None:
        pool = Pool(object, 1)
        with pytest.raises(KeyError):
            async with pool.lease() as broken:
                raise KeyError
        async with pool.lease() as other:
            assert other is not broken

    asyncio.run(run())
    with pytest.raises(ValueError, match="size=0"):
        Pool(object, 0)


pieces = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=4)))


@given(st.lists(st.integers(0, 9), min_size=1), pieces)
def test_a_trajectory_keeps_every_token(
    prompt: list[int], pieces: list[tuple[bool, list[int]]]
) -> None:
    trajectory = Trajectory(list(prompt))
    for is_model, tokens in pieces:
        if is_model:
            trajectory.add_sample(Sample(tokens, [-1.0] * len(tokens)))
        else:
            trajectory.add_observation(tokens)
    assert trajectory.tokens == prompt + [token for _, tokens in pieces for token in tokens]
    assert len(trajectory) == len(trajectory.tokens)
    expected = [int(is_model) for is_model, tokens in pieces for _ in tokens]
    output = for_trl([trajectory])
    assert output["env_mask"] == [expected]
    assert output["logprobs"] == [[-1.0 * value for value in expected]]
    assert output["prompt_ids"] == [prompt]
    assert len(output["completion_ids"][0]) == len(expected)
