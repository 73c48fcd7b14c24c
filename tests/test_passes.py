"""Rows dealt into passes by tokens, and what is planned for a GPU."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from common import costs, passes
from common.model_config import ModelConfig
from common.passes import Limit
from common.ranks import Ranks

QWEN3_8B = ModelConfig.from_json(Path(__file__).resolve().parents[1] / "configs" / "shapes" / "Qwen3-8B.json")
CPU = torch.device("cpu")


def dealt(lengths: list[int], world: int, limit: Limit) -> list[list[tuple[list[int], int]]]:
    return [passes.micro_batches(range(len(lengths)), lengths, Ranks(r, world, CPU), limit) for r in range(world)]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=70),
    world=st.integers(1, 5),
    limit=st.builds(Limit, rows=st.integers(0, 6), tokens=st.integers(0, 120)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_row_is_dealt_once_and_all_ranks_make_the_same_number_of_passes(lengths, world, limit):
    of_ranks = dealt(lengths, world, limit)
    assert len({len(mine) for mine in of_ranks}) == 1
    real = [i for mine in of_ranks for rows, count in mine for i in rows[:count]]
    assert sorted(real) == list(range(len(lengths)))
    for mine in of_ranks:
        for rows, count in mine:
            assert count in (0, len(rows)) and rows
            assert not limit.rows or len(rows) <= limit.rows
            assert not limit.tokens or len(rows) == 1 or sum(lengths[i] for i in rows) <= limit.tokens
    assert lengths[of_ranks[0][0][0][0]] == max(lengths)  # the longest row goes first


def test_passes_are_filled_with_tokens():
    """60 tokens hold 50 alone, then 30 and 20 and 10; two ranks get 50 20 and 30 10."""
    assert [rows for rows, _ in dealt([20, 50, 30, 10], 1, Limit(tokens=60))[0]] == [[1], [2, 0, 3]]
    of_ranks = dealt([20, 50, 30, 10], 2, Limit(tokens=60))
    assert of_ranks == [[([1], 1), ([0], 1)], [([2, 3], 2), ([3], 0)]]
    assert dealt([20, 50, 30, 10], 1, Limit()) == [[([1, 2, 0, 3], 4)]]
    assert Limit(tokens=1000).without_gradient() == Limit(tokens=4000)
    assert Limit(tokens=10_000).without_gradient() == Limit(tokens=16_384)
    assert Limit(tokens=20_000).without_gradient() == Limit(tokens=20_000)
    assert Limit(rows=2).without_gradient() == Limit(rows=8)


def planned(memory: float, **changes) -> tuple[str, int]:
    s = dataclasses.replace(train.TrainSettings(), **changes)
    lengths = [600 + 5 * i for i in range(100)]  # 600 to 1,095
    return passes.planned(s, QWEN3_8B, lengths, 2, memory * 1e9, 4)


def test_the_plan_recomputes_only_where_memory_is_short():
    levels = [planned(memory)[0] for memory in (300, 74, 37, 24, 10)]
    assert levels == ["none", "none", "cheap", "full", "full"]  # 10 GB: the weights alone do not fit
    assert planned(300)[1] == 16384  # the share of one of four ranks has some 17,000 tokens
    assert planned(10)[1] == 1095  # at least the longest row, and the run says what did not fit
    for memory in (24, 37, 74):
        level, tokens = planned(memory)
        assert passes.needed(QWEN3_8B, 32, 2, tokens, level, 1) <= memory * 1e9
        assert passes.needed(QWEN3_8B, 32, 2, tokens + passes.STEP, level, 1) > memory * 1e9 or tokens == passes.MOST


def test_the_plan_keeps_what_is_asked_for():
    assert planned(74, recompute="full") == ("full", 16384)
    assert planned(37, micro_tokens=2000) == ("none", 2000)
    assert planned(37, micro_batch=2) == ("none", 1095 + 1090)
    assert planned(37, compile=True)[0] == "full"  # the compiler makes cheap things again by itself
    assert planned(37, batch_size=4)[1] == 1280  # one row a rank and step: 1,095 tokens in whole 256


def test_on_a_cpu_a_pass_has_a_fixed_number_of_tokens():
    def chosen(**changes):
        return passes.chosen(train.TrainSettings(**changes), QWEN3_8B, [10, 20], 4, Ranks(0, 1, CPU))

    assert chosen() == ("none", Limit(tokens=passes.CPU_TOKENS))
    assert chosen(micro_batch=3, recompute="cheap") == ("cheap", Limit(rows=3))
    assert chosen(micro_batch=3, micro_tokens=50) == ("none", Limit(3, 50))


def test_one_measured_pass_sets_the_limit(monkeypatch):
    """Half of 8,000 tokens: rows of 1,000 and 900 and so on. 50 GB of room, 10 held, 2.5 MB a token measured."""
    lengths = [1000 - 100 * i for i in range(10)]
    state = SimpleNamespace(ran=[], peak=0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state.peak)
    monkeypatch.setattr(passes, "room", lambda device, ranks: 50e9)

    def run(rows):
        state.ran.append(rows)
        state.peak = 10e9 + 2.5e6 * sum(lengths[i] for i in rows)

    ranks = SimpleNamespace(device=CPU, gather=lambda value: [value, value + 1])
    limit = passes.measured(Limit(tokens=8000), lengths, 10**8, run, ranks)
    assert state.ran == [[0, 1, 2, 3, 4]]  # 4,000 tokens
    assert limit == Limit(tokens=int((50e9 - 10e9 - 16e8) / 2.5e6))
    monkeypatch.setattr(passes, "room", lambda device, ranks: 500e9)
    assert passes.measured(Limit(tokens=8000), lengths, 0, run, ranks) == Limit(tokens=passes.MOST)
    monkeypatch.setattr(passes, "room", lambda device, ranks: 11e9)
    assert passes.measured(Limit(tokens=8000), lengths, 0, run, ranks) == Limit(tokens=1000)  # the longest row


def test_the_levels_are_ordered():
    for fused, least in ((True, 1.5), (False, 1.1)):  # the torch text keeps silu(gate) and norms in fp32 at "cheap" too
        none, cheap, full = (costs.kept_per_token(QWEN3_8B, 32, 2, level, fused) for level in costs.RECOMPUTE)
        assert none > least * cheap and cheap > 10 * full
