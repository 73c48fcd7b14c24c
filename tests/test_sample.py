"""sample.py against transformers' generate and logits processors, a slow sampler of its own, and itself rearranged."""

import itertools
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from scipy.stats import chisquare
from tokenizers import Tokenizer, models

import model as qwen
import sample
from common import hub, tokens
from common.errors import InputError, NumericsError
from common.model_config import ModelConfig
from common.ranks import Progress, Ranks
from pipeline.config import RunConfig
from pipeline.run import Run
from sample import Completion, Sampling, generate, pick, shortlisted, uniform

VOCAB = 300  # above SHORTLIST, so that the shortcut can fail to settle a row
CONFIG = ModelConfig(VOCAB, 32, 64, 2, 4, 2, 16, 1e-6, 1e4, True, 512, 1)


@pytest.fixture(scope="module")
def tiny() -> qwen.Qwen3:
    """Random weights, large enough that the next-token distributions are neither flat nor certain."""
    torch.manual_seed(0)
    m = qwen.Qwen3(CONFIG)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(1.0, 0.2) if p.ndim == 1 else p.normal_(0.0, 0.25)
    return m.eval()


def make_prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 40 tokens; every fourth repeats the one before it."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for i in range(n):
        repeat = i % 4 == 3
        prompts.append(prompts[-1] if repeat else [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 17, 40)))])
    return prompts


# -- random numbers ----------------------------------------------------------------------------------------------


def slow_uniform(seed: int, position: int) -> float:
    """The same hash in Python's unbounded integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    return (mix((mix(seed % 2**64) + position) % 2**64) >> 11) / 2**53


def test_splitmix64_known_values() -> None:
    """The first three outputs of splitmix64 from state 0, as published with the generator."""
    states = torch.tensor([sample._signed(k * 0x9E3779B97F4A7C15) for k in range(3)])
    out = [x % 2**64 for x in sample._splitmix64(states).tolist()]
    assert out == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniform_equals_the_slow_version() -> None:
    rng = random.Random(1)
    pairs = [(rng.randrange(2**32), rng.randrange(8192)) for _ in range(50)]
    pairs += [(0, 0), (2**64 - 1, 5), (2**63, 0), (sample.seed_of(0, "a", "on", 0), 2**40)]
    seeds = torch.tensor([sample._signed(seed) for seed, _ in pairs])
    got = uniform(seeds, torch.tensor([position for _, position in pairs])).tolist()
    assert got == [slow_uniform(seed, position) for seed, position in pairs]
    assert all(0 <= u < 1 for u in got)


def test_uniform_is_uniform_over_neighbouring_seeds_and_positions() -> None:
    seeds, positions = torch.arange(200).repeat_interleave(500), torch.arange(500).repeat(200)
    u = uniform(seeds, positions)
    assert chisquare(torch.histc(u, 100, 0, 1).numpy()).pvalue > 0.01
    pairs = (u[:-1] * 10).long() * 10 + (u[1:] * 10).long()  # a number says nothing about the next one
    assert chisquare(pairs.bincount(minlength=100).numpy()).pvalue > 0.01
    across = (u[:-500] * 10).long() * 10 + (u[500:] * 10).long()  # nor about the next seed's
    assert chisquare(across.bincount(minlength=100).numpy()).pvalue > 0.01


def test_seed_of_is_the_crc_of_the_identity() -> None:
    assert sample.seed_of(0, "q1", "on", 0) == 0x3B0F1A7A  # as gzip computes it
    others = {sample.seed_of(s, i, m, d) for s in (0, 1) for i in ("q1", "q2") for m in ("on", "off") for d in (0, 1)}
    assert len(others) == 16


# -- one token -----------------------------------------------------------------------------------------------------


def exact(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """(V,) probabilities after transformers' own processors, in their order."""
    chain = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(how.temperature)])
    if how.top_k:
        chain.append(hf.TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        chain.append(hf.TopPLogitsWarper(how.top_p))
    if how.min_p:
        chain.append(hf.MinPLogitsWarper(how.min_p))
    return chain(torch.zeros(1, 1, dtype=torch.int64), logits[None].double())[0].softmax(-1)


def slow_pick(logits: list[float], u: float, how: Sampling) -> int:
    """The definition in plain Python: sort, cut, cut, cut, walk along the cumulative distribution."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if how.temperature == 0:
        return order[0]
    if how.top_k:
        order = order[: how.top_k]
    weights = torch.tensor([logits[i] for i in order], dtype=torch.float64).div(how.temperature).softmax(0).tolist()
    kept, mass = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= how.top_p or weight < how.min_p * weights[0]:
            break
        kept.append((i, weight))
        mass += weight
    walked = 0.0
    for i, weight in kept:
        walked += weight / mass
        if u < walked:
            return i
    return kept[-1][0]


SETTINGS = [
    Sampling(0.6, 0.95, 20, 0.0),  # the paper's decoding
    Sampling(0.2, 0.9, 0, 0.0),  # the paper's draws
    Sampling(1.0, 1.0, 0, 0.0),
    Sampling(2.0, 0.7, 0, 0.0),
    Sampling(1.0, 1.0, 5, 0.0),
    Sampling(1.0, 0.5, 1000, 0.0),  # top_k above the vocabulary
    Sampling(1.5, 1.0, 0, 0.1),
    Sampling(1.3, 0.9, 40, 0.05),
    Sampling(3.0, 0.99, 0, 0.02),
    Sampling(1.0, 1e-6, 0, 0.0),
    Sampling(1.0, 1.0, 1, 1.0),
]


@pytest.mark.parametrize("how", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0], ids=["flat", "peaked"])
def test_pick_has_the_distribution_of_transformers(how: Sampling, spread: float) -> None:
    """u on an even grid: each token's share of the grid is its probability, to within one grid step at either end."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * spread
    M = 4000
    u = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    share = pick(logits.expand(M, VOCAB), u, how).bincount(minlength=VOCAB) / M
    expected = exact(logits, how)
    assert (share - expected).abs().max() <= 1.5 / M
    assert ((expected > 0) | (share == 0)).all()


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_pick_equals_the_slow_version_and_the_full_sort(how: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from flat to nearly certain in one batch, so that the shortlist settles some and leaves others."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(60, VOCAB, generator=generator) * torch.linspace(0.05, 6, 60)[:, None]
    u = torch.rand(60, dtype=torch.float64, generator=generator)
    u[:4] = torch.tensor([0.0, 1 - 2**-53, 0.0, 1 - 2**-53])
    short = pick(logits, u, how)
    assert short.tolist() == [slow_pick(row, x, how) for row, x in zip(logits.tolist(), u.tolist(), strict=True)]
    monkeypatch.setattr(sample, "SHORTLIST", VOCAB)
    assert torch.equal(pick(logits, u, how), short)


def test_pick_greedy_and_16_bit_logits() -> None:
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(6))
    u = torch.full((9,), 0.3, dtype=torch.float64)
    assert torch.equal(pick(logits, u, Sampling(temperature=0)), logits.argmax(-1))
    low = logits.bfloat16()
    how = Sampling(1.0, 0.9, 0, 0.0)
    assert torch.equal(pick(low, u, how), pick(low.float(), u, how))


# -- whole completions -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_equals_transformers_generate(tiny: qwen.Qwen3, tmp_path: object) -> None:
    qwen.save(tiny, tmp_path)
    peer = hf.Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    prompts = make_prompts(9)
    out = generate(tiny, prompts, [0] * 9, max_new=30, stop_ids=set(), temperature=0, batch_size=4)
    for prompt, completion in zip(prompts, out, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=None
        )
        assert completion == Completion(expected[0, len(prompt) :].tolist(), "length")


@pytest.mark.parametrize("how", [SETTINGS[0], SETTINGS[2], SETTINGS[8]], ids=str)
@torch.no_grad()
def test_sampled_text_equals_a_slow_sampler(tiny: qwen.Qwen3, how: Sampling) -> None:
    """Token by token from the full forward pass without a cache, with the slow hash and the slow pick."""
    prompts, stops = make_prompts(5), {7, 11}
    seeds = [sample.seed_of(0, f"q{i}", "on", 0) for i in range(5)]
    out = generate(tiny, prompts, seeds, max_new=25, stop_ids=stops, batch_size=3, **vars(how))
    for prompt, seed, completion in zip(prompts, seeds, out, strict=True):
        ids: list[int] = []
        while len(ids) < 25 and not (ids and ids[-1] in stops):
            row = torch.tensor(prompt + ids)
            logits = tiny.logits(tiny(row, torch.tensor([0, len(row)]))[-1])
            ids.append(slow_pick(logits.tolist(), slow_uniform(seed, len(ids)), how))
        assert completion.ids == ids


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}], ids=str)
def test_text_depends_on_the_seed_alone(tiny: qwen.Qwen3, settings: dict[str, float]) -> None:
    """Whatever the batch size, the order of the prompts, the refills and the neighbours' ends: the same text."""
    n = 36
    prompts, rng = make_prompts(n), random.Random(2)
    seeds, limits = [100 + i for i in range(n)], [rng.choice((1, 7, 30, 70)) for _ in range(n)]
    common = dict(stop_ids={5, 6}, **settings)
    expected = generate(tiny, prompts, seeds, max_new=limits, batch_size=n, **common)
    assert len({c.finish for c in expected}) == 2
    for batch_size in (1, 3, 16):
        order = list(range(n))
        rng.shuffle(order)
        order = order[: {1: 4, 3: 18}.get(batch_size, n)]
        args = ([values[i] for i in order] for values in (prompts, seeds))
        out = generate(tiny, *args, max_new=[limits[i] for i in order], batch_size=batch_size, **common)
        assert out == [expected[i] for i in order]
    if settings.get("temperature") != 0:
        other = generate(tiny, prompts, [s + 1000 for s in seeds], max_new=limits, batch_size=n, **common)
        assert other != expected


def test_logits_of_a_row_do_not_move_by_one_bit(tiny: qwen.Qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the text reproducible: the logits themselves, for every token, whatever the batch size."""
    seen: dict[float, torch.Tensor] = {}

    def watched(logits: torch.Tensor, u: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        for key, row in zip(u.tolist(), logits, strict=True):  # the random number tells the row and the position
            assert torch.equal(seen.setdefault(key, row.clone()), row), key
        return shortlisted(logits, u, how)

    monkeypatch.setattr(sample, "shortlisted", watched)
    n = 25
    limits = [5 + 13 * i % 50 for i in range(n)]
    for batch_size, rows in ((n, n), (1, 4), (3, 9), (17, n)):
        prompts, seeds = make_prompts(n)[:rows], list(range(rows))
        generate(tiny, prompts, seeds, max_new=limits[:rows], stop_ids={5}, batch_size=batch_size)
    assert len(seen) > 500


def test_rows_of_like_length_stay_together(tiny: qwen.Qwen3) -> None:
    """After rows have left: no holes, the longest in the first group, every slot with its own row's numbers."""
    rng = random.Random(8)
    group = qwen.GROUP["cpu"]
    n = 3 * group - 5
    batch = sample._Batch(tiny, [[1] * 9] * n, [0] * n, [400] * n, set(), n, Sampling())
    batch._reshape(batch.most)
    for round_ in range(4):
        lens = torch.tensor(rng.sample(range(10, 300), n))
        batch.active = n
        batch.row[:n], batch.cache.lens[:n] = torch.arange(n), lens
        batch.cache.k[0][:n, 0, 0, 0] = lens.float()
        alive = torch.tensor(sorted(rng.sample(range(n), n - 7 * round_)))
        batch._arrange(alive)
        left = len(alive)
        assert sorted(batch.row[:left].tolist()) == alive.tolist()
        assert batch.cache.lens[:left].tolist() == lens[batch.row[:left]].tolist()
        assert batch.cache.k[0][:left, 0, 0, 0].tolist() == lens[batch.row[:left]].tolist()
        assert batch.cache.lens[left:n].sum() == 0
        groups = [part.sort(descending=True).values for part in batch.cache.lens[:left].split(group)]
        assert torch.equal(torch.cat(groups), lens[alive].sort(descending=True).values)


def test_first_tokens_follow_the_model(tiny: qwen.Qwen3) -> None:
    """4,000 draws of one prompt against the exact distribution."""
    n, prompt = 4000, [3, 141, 59]
    how = Sampling(0.9, 0.9, 12, 0.0)
    out = generate(tiny, [prompt] * n, list(range(n)), max_new=1, stop_ids=set(), batch_size=1000, **vars(how))
    counts = torch.tensor([c.ids[0] for c in out]).bincount(minlength=VOCAB)
    with torch.no_grad():
        expected = exact(tiny.logits(tiny(torch.tensor(prompt), torch.tensor([0, 3]))[-1]), how)
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    assert seen.sum() >= 4
    assert chisquare(counts[seen].numpy(), (n * expected[seen]).numpy()).pvalue > 0.01


def test_stop_ids_limits_and_progress(tiny: qwen.Qwen3) -> None:
    """The greedy text is known; ending it at a token or a length gives its prefix, with the stop id kept."""
    prompts = make_prompts(12, seed=3)
    limits = [1 + 7 * i % 23 for i in range(12)]
    free = generate(tiny, prompts, [0] * 12, max_new=23, stop_ids=set(), temperature=0)
    stop = free[4].ids[2]
    steps: list[int] = []
    out = generate(
        tiny,
        prompts,
        [0] * 12,
        max_new=limits,
        stop_ids={stop, 299},
        temperature=0,
        batch_size=5,
        progress=steps.append,
    )
    for whole, limit, completion in zip(free, limits, out, strict=True):
        end = whole.ids.index(stop) + 1 if stop in whole.ids else 24
        assert completion.ids == whole.ids[: min(end, limit)]
        assert completion.finish == ("stop" if end <= limit else "length")
    assert any(c.finish == "stop" for c in out) and any(c.finish == "length" for c in out)
    assert sum(steps) == sum(len(c.ids) for c in out) and max(steps) == 5


def test_equal_prompts_are_read_once(tiny: qwen.Qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    forward = qwen.Qwen3.forward
    monkeypatch.setattr(
        qwen.Qwen3, "forward", lambda self, ids, *rest: read.append(len(ids)) or forward(self, ids, *rest)
    )
    generate(tiny, [list(range(30))] * 6, list(range(6)), max_new=1, stop_ids=set())
    assert read == [29 + sample.ROWS]  # one prefill with its padding row


def test_long_queue_of_prompts_is_read_in_parts(tiny: qwen.Qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(20)
    common = dict(max_new=5, stop_ids=set())
    expected = generate(tiny, prompts, list(range(20)), **common)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 30)
    assert generate(tiny, prompts, list(range(20)), **common) == expected


def test_no_prompts(tiny: qwen.Qwen3) -> None:
    assert generate(tiny, [], [], max_new=5, stop_ids={1}) == []


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {}, "prompt 1 is empty"),
        ([1, VOCAB], {}, "prompt 1 holds an id outside 0..299"),
        ([-1], {}, "prompt 1 holds an id outside 0..299"),
        ([1] * 500, {"max_new": 13}, "prompt 1: 500 tokens + 13 new exceed max_position_embeddings 512"),
        ([1], {"max_new": [3, 0]}, "max_new of prompt 1 is 0"),
        ([1], {"temperature": -1}, "temperature is -1"),
        ([1], {"top_p": 0}, "top_p is 0"),
        ([1], {"top_p": 1.1}, "top_p is 1.1"),
        ([1], {"top_k": -1}, "top_k is -1"),
        ([1], {"min_p": 2}, "min_p is 2"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_refused_input(tiny: qwen.Qwen3, prompt: list[int], settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        generate(tiny, [[1, 2], prompt], [0, 1], **{"max_new": 4, "stop_ids": set(), **settings})


def test_the_whole_context_can_be_used(tiny: qwen.Qwen3) -> None:
    out = generate(tiny, [[1] * 500], [0], max_new=12, stop_ids=set())
    assert len(out[0].ids) == 12


# -- several steps at once, as a GPU makes them ------------------------------------------------------------------------


DRAWS = {"temperature": 0.2, "top_p": 0.9, "top_k": 0}


@pytest.mark.parametrize(
    ("settings", "shortlist"), [({"temperature": 0}, 4), ({}, 4), (DRAWS, 128), (DRAWS, 4)], ids=str
)
def test_steps_ahead_change_no_token(
    tiny: qwen.Qwen3, settings: dict[str, float], shortlist: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops, limits, refills, rows that go back and a cache made longer: the tokens of one step at a time.

    Fewer candidates leave rows unsettled now and then; no row writes behind its slot.
    """
    n, rng = 20, random.Random(4)
    prompts, seeds, limits = make_prompts(n), list(range(n)), [rng.choice((1, 5, 40, 90)) for _ in range(n)]
    common = dict(max_new=limits, stop_ids={5, 6, 7}, batch_size=9, **settings)
    expected = generate(tiny, prompts, seeds, **common)
    assert {c.finish for c in expected} == {"stop", "length"}
    monkeypatch.setattr(sample, "SHORTLIST", shortlist)
    monkeypatch.setitem(sample.AHEAD, "cpu", 8)
    monkeypatch.setattr(sample, "CPU_ROOM", 10 * qwen.KVCache.bytes(CONFIG, 1, torch.float32, "cpu"))
    issued, taken, open_rows = [], [], []
    decode, whole = sample._Batch._decode, sample.pick

    def watched(self: sample._Batch, steps: int) -> torch.Tensor:
        active = slice(self.active)
        assert (self.cache.lens[active] + steps).max() <= self.cache.length
        assert (self.count[active] + steps <= self.limit[active]).all()
        tokens = decode(self, steps)
        assert (self.state[0] >= 0).all()
        issued.append(steps)
        return tokens

    monkeypatch.setattr(sample._Batch, "_decode", watched)
    monkeypatch.setattr(sample, "pick", lambda logits, *rest: open_rows.append(len(logits)) or whole(logits, *rest))
    out = generate(tiny, prompts, seeds, progress=taken.append, **common)
    assert out == expected
    assert sum(taken) == sum(len(c.ids) for c in out)
    assert max(issued) == 8 and len(set(issued)) > 2
    assert bool(open_rows) == (settings is DRAWS and shortlist == 4)


@pytest.mark.parametrize(("settings", "shortlist"), [({}, 128), (DRAWS, 4)], ids=str)
def test_a_captured_step_replayed_gives_the_same_text(
    tiny: qwen.Qwen3, settings: dict[str, float], shortlist: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of a CUDA graph a function that makes the step as it was captured, spare slots included.

    One is captured for each number of rows and each cache, whatever the lengths.
    """
    n = 17
    prompts, limits = make_prompts(n), [3 + 37 * i % 120 for i in range(n)]
    run = dict(max_new=limits, stop_ids={5}, **settings)
    expected = generate(tiny, prompts, list(range(n)), **run)
    monkeypatch.setitem(sample.AHEAD, "cpu", 8)
    monkeypatch.setattr(sample, "SHORTLIST", shortlist)
    monkeypatch.setattr(sample, "CPU_ROOM", 18 * qwen.KVCache.bytes(CONFIG, 1, torch.float32, "cpu"))
    init, captured = sample._Batch.__init__, []

    def as_on_a_gpu(self: sample._Batch, *args: Any) -> None:
        init(self, *args)
        self.captured = True

    def capture(self: sample._Batch, rows: int, groups: list[tuple[int, int]]) -> tuple[Any, torch.Tensor]:
        captured.append((rows, self.cache.length))
        logits, whole = torch.zeros(rows, VOCAB), [(rows, self.cache.length)]
        return SimpleNamespace(replay=lambda: logits.copy_(self._step(rows, whole))), logits

    monkeypatch.setattr(sample._Batch, "__init__", as_on_a_gpu)
    monkeypatch.setattr(sample._Batch, "_capture", capture)
    assert generate(tiny, prompts, list(range(n)), batch_size=16, **run) == expected
    assert len(captured) >= 2 and all(a != b for a, b in itertools.pairwise(captured))


def test_rows_go_back_to_before_an_unsettled_token(tiny: qwen.Qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat distributions and a shortlist of two: hardly a row is settled. Then steps are issued one by one."""
    monkeypatch.setattr(sample, "SHORTLIST", 2)
    run = dict(max_new=12, stop_ids={5}, temperature=3.0, top_p=1.0, top_k=0)
    expected = generate(tiny, make_prompts(6), list(range(6)), **run)
    monkeypatch.setitem(sample.AHEAD, "cpu", 4)
    taken: list[int] = []
    assert generate(tiny, make_prompts(6), list(range(6)), progress=taken.append, **run) == expected
    assert taken[0] < 6 and len(taken) <= 14


@pytest.mark.parametrize("how", [{"temperature": 0}, {}, {"temperature": 1.0, "top_k": 0}], ids=str)
def test_bad_numbers_some_steps_ahead_name_their_prompt(
    tiny: qwen.Qwen3, how: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The greedy or drawn token of one row has an infinite embedding: the step after it is not finite. One that ends
    with that token has no step after it."""
    monkeypatch.setitem(sample.AHEAD, "cpu", 8)
    run = dict(max_new=8, **how)
    free = generate(tiny, [[1, 2], [3], [4]], [0, 1, 2], stop_ids=set(), **run)
    others = set(free[0].ids + free[2].ids + [1, 2, 3, 4])
    at, bad = next((at, i) for at, i in enumerate(free[1].ids[:-1]) if i not in others)
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    untied = qwen.Qwen3(ModelConfig(*list(vars(CONFIG).values())[:9], False, 512, 1)).eval()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.embed_tokens.weight"][bad, 0] = torch.inf
    untied.load_state_dict(state)
    with pytest.raises(NumericsError, match="prompt 1") as caught:
        generate(untied, [[1, 2], [3], [4]], [0, 1, 2], stop_ids=set(), **run)
    assert caught.value.row == 1
    out = generate(untied, [[1, 2], [3], [4]], [0, 1, 2], stop_ids={bad}, **run)
    assert [c.ids for c in out] == [free[0].ids, free[1].ids[: at + 1], free[2].ids]
    # Nor does the row that takes its slot see what it would have left behind its end.
    alone = dict(stop_ids={bad}, batch_size=1, max_new=8, **how)
    monkeypatch.setattr(sample, "ROWS", 1)
    after = generate(untied, [[3], [4]], [1, 2], **alone)
    assert [c.ids for c in after] == [generate(untied, [p], [s], **alone)[0].ids for p, s in (([3], 1), ([4], 2))]
    assert after[0].ids[-1] == bad and len(after[0].ids) < 8


# -- memory ----------------------------------------------------------------------------------------------------------


def test_shape_takes_what_fits() -> None:
    """Against every (slots, blocks) there is: room for all rows with twice the blocks, else the most slots that fit."""
    for room in range(1, 60):
        for rows in (1, 3, 7):
            for most in (1, 2, 5, 9):
                for blocks in range(1, most + 1):
                    if blocks > room:
                        continue
                    slots, length = sample.shape(room, 1, rows, blocks, most)
                    assert slots * length <= room and blocks <= length <= most and 1 <= slots <= rows
                    if rows * min(2 * blocks, most) <= room:
                        assert (slots, length) == (rows, min(2 * blocks, most))
                    else:
                        assert length == blocks and slots == max(n for n in range(1, rows + 1) if n * blocks <= room)


def test_admitted_takes_the_longest_prefix_that_fits() -> None:
    rng = random.Random(3)
    for _ in range(300):
        active = [rng.randint(1, 4) for _ in range(rng.randint(0, 4))]
        waiting = [rng.randint(1, 6) for _ in range(rng.randint(0, 6))]
        room, most = rng.randint(sum(active) * 2 + 1, 40), len(active) + rng.randint(0, 6)
        n, blocks = sample.admitted(room, 1, active, waiting, most)
        fits = [0]
        for k in range(1, len(waiting) + 1):
            rows = active + waiting[:k]
            if len(rows) <= most and len(rows) * max(rows) <= room:
                fits.append(k)
        assert n == fits[-1]
        assert blocks == max([*active, *waiting[:n]], default=0)


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"temperature": 1.0, "top_p": 1.0, "top_k": 0}, marks=pytest.mark.long)], ids=str
)
def test_little_memory_gives_the_same_text(
    tiny: qwen.Qwen3, settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 14 rows of one block, 2 of the longest: rows go back and come again, and the cache stays in its room."""
    n, rng = 24, random.Random(4)
    prompts, seeds, limits = make_prompts(n), list(range(n)), [rng.choice((9, 60, 130, 300)) for _ in range(n)]
    common = dict(max_new=limits, stop_ids={5, 6}, batch_size=20, **settings)
    expected = generate(tiny, prompts, seeds, **common)
    block = qwen.KVCache.bytes(CONFIG, 1, torch.float32, "cpu")
    batches: list[sample._Batch] = []
    sizes, again = [], []
    init, reshape, least = sample._Batch.__init__, sample._Batch._reshape, sample.least
    monkeypatch.setattr(sample._Batch, "__init__", lambda self, *args: batches.append(self) or init(self, *args))
    monkeypatch.setattr(sample, "least", lambda *args: again.append(least(*args)) or again[-1])

    def watched(self: sample._Batch, blocks: int) -> None:
        reshape(self, blocks)
        sizes.append((self.rows, self.cache.length // self.block))

    monkeypatch.setattr(sample._Batch, "_reshape", watched)
    monkeypatch.setattr(sample, "CPU_ROOM", 14 * block + 1)
    steps: list[int] = []
    assert generate(tiny, prompts, seeds, progress=steps.append, **common) == expected
    assert all(rows * blocks <= 14 for rows, blocks in sizes)
    assert max(blocks for _, blocks in sizes) > 2 and min(rows for rows, _ in sizes) < 7
    assert sum(map(len, again)) >= 3, "rows should have gone back to the waiting ones"
    shrunk = [a for a, b in zip(sizes, sizes[1:], strict=False) if b[0] > a[0]]
    assert shrunk, "when the long rows have ended, there is room for more rows again"
    assert sum(steps) == sum(len(c.ids) for c in expected)  # no token is sampled twice
    assert not batches[0].begun and not batches[0].waiting
    monkeypatch.setattr(sample, "CPU_ROOM", 6 * block)  # one row of the longest at a time
    some = common | {"max_new": [300, *limits[1:5]]}
    alone = generate(tiny, prompts[:5], seeds[:5], **some)
    assert alone[1:] == expected[1:5]


def test_a_row_that_never_fits_is_refused_at_the_start(tiny: qwen.Qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 + 200 tokens are 4 blocks of 64."""
    block = qwen.KVCache.bytes(CONFIG, 1, torch.float32, "cpu")
    run = dict(max_new=200, stop_ids=set())
    monkeypatch.setattr(sample, "CPU_ROOM", 4 * block)
    assert len(generate(tiny, [[1] * 10], [0], **run)[0].ids) == 200
    monkeypatch.setattr(sample, "CPU_ROOM", 4 * block - 1)
    with pytest.raises(InputError, match=r"one row of 210 tokens needs .* lower --max-new or --draw-max-new"):
        generate(tiny, [[1] * 10], [0], **run)


def test_memory_of_qwen3_8b() -> None:
    """8,190,735,360 parameters of 2 bytes; a token's keys and values: 36 layers, 2, 8 heads of 128, 2 bytes."""
    config = ModelConfig.from_json(Path(__file__).parents[1] / "configs/shapes/Qwen3-8B.json")
    cache = 16 * 8192 * 36 * 2 * 8 * 128 * 2
    got = sample.memory(config, torch.bfloat16, 16, 8192)
    assert got == pytest.approx(2 * 8_190_735_360 + cache / 0.8, abs=1)
    one = sample.memory(config, torch.bfloat16, 1, 8192)
    sample.check_memory(config, torch.bfloat16, 8192, 24 * 10**9, "--max-new")
    with pytest.raises(InputError, match=r"16.7 GiB for the model and one row of 8,192 tokens.* lower --max-new"):
        sample.check_memory(config, torch.bfloat16, 8192, one - 1, "--max-new")


# -- fewer rows than the CPU's kernels want, ids without a token, numbers that are none --------------------------------


def test_small_batches_compute_only_what_there_is(tiny: qwen.Qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of each step: 16 at least without it. The greedy text is still the model's, as the padded steps give it."""
    seen: list[int] = []
    decode = qwen.Qwen3.decode
    monkeypatch.setattr(
        qwen.Qwen3, "decode", lambda self, ids, *rest: seen.append(len(ids)) or decode(self, ids, *rest)
    )
    run = dict(max_new=[3, 5, 5], stop_ids=set(), temperature=0)
    padded = generate(tiny, make_prompts(3), [0] * 3, **run)
    assert seen == [16] * 5
    seen.clear()
    assert generate(tiny, make_prompts(3), [0] * 3, small_batches=True, **run) == padded
    assert seen == [3, 3, 3, 2, 2]


def test_ids_without_a_token_are_never_sampled(tiny: qwen.Qwen3) -> None:
    """40 more rows in the head, each likelier than all others, at its end or as a hole in it: the text without them."""
    state = tiny.state_dict()
    table = state["model.embed_tokens.weight"]
    extra, hole = 3 * table[:40], 30
    config = ModelConfig(VOCAB + 40, *list(vars(CONFIG).values())[1:])
    for start in (VOCAB, hole):
        wide = qwen.Qwen3(config).eval()
        wide.load_state_dict(state | {"model.embed_tokens.weight": torch.cat((table[:start], extra, table[start:]))})
        moved = [i if i < start else i + 40 for i in range(VOCAB)]  # the narrow model's ids in the wide one
        never = sorted(set(range(VOCAB + 40)) - set(moved))
        prompts, seeds = make_prompts(20), list(range(20))
        there = [[moved[i] for i in prompt] for prompt in prompts]
        for how in ({"temperature": 0}, {}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}):
            run = dict(max_new=10, **how)
            free = generate(wide, there, seeds, stop_ids={moved[7]}, **run)
            assert any(i in never for c in free for i in c.ids)
            narrow = generate(tiny, prompts, seeds, stop_ids={7}, **run)
            masked = generate(wide, there, seeds, stop_ids={moved[7]}, never=never, **run)
            assert [c.ids for c in masked] == [[moved[i] for i in c.ids] for c in narrow]


def test_the_tokenizers_holes_are_found(tiny_tokenizer) -> None:
    used = set(tiny_tokenizer.get_vocab(with_added_tokens=True).values())
    top = max(used)
    assert tokens.unused_ids(tiny_tokenizer, top + 4) == sorted(set(range(top + 4)) - used)
    gappy = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 5}, merges=[]))
    gappy.add_special_tokens(["<end>"])
    assert tokens.unused_ids(gappy, 9) == [2, 4, 6, 7, 8]  # the added token takes 3, the size of the table


@pytest.mark.parametrize("how", [{"temperature": 0}, {}, {"temperature": 1.0, "top_k": 0}], ids=str)
def test_logits_that_are_not_finite_end_the_sampling(tiny: qwen.Qwen3, how: dict[str, float]) -> None:
    """NaN in the last norm: the first prompt. An infinite embedding of one token: the prompt that holds it."""
    broken = qwen.Qwen3(CONFIG).eval()
    broken.load_state_dict(tiny.state_dict() | {"model.norm.weight": tiny.model.norm.weight * torch.nan})
    with pytest.raises(NumericsError, match="prompt 0: the logits are not finite") as caught:
        generate(broken, [[1, 2], [3]], [0, 1], max_new=4, stop_ids=set(), **how)
    assert caught.value.row == 0
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    untied = qwen.Qwen3(ModelConfig(*list(vars(CONFIG).values())[:9], False, 512, 1)).eval()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.embed_tokens.weight"][3, 0] = torch.inf
    untied.load_state_dict(state)
    with pytest.raises(NumericsError, match="prompt 1") as caught:
        generate(untied, [[1, 2], [3], [4]], [0, 1, 2], max_new=1, stop_ids=set(), **how)
    assert caught.value.row == 1


def test_progress_says_what_is_done_and_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by hand: 2 of 8 completions in 30 s leave 90 s; 600 tokens in 30 s are 20 a second."""
    now = [0.0]
    monkeypatch.setattr("common.ranks.time.perf_counter", lambda: now[0])
    progress = Progress(Ranks(0, 1, torch.device("cpu")), 8, "draws", "completions", parts="tokens")
    progress(1, 400)
    now[0] = 30.0
    progress(1, 200)
    expected = "draws: 2/8 completions, 600 tokens, 20 a second, 25% done, about 0:01:30 left\n"
    assert capsys.readouterr().err == expected
    assert progress.close() == 20


def test_a_run_samples_its_tokenizers_ids_and_names_the_question_of_bad_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    folder = root / "mini" / "model"
    settings = dict(model=str(folder), prompt=str(root / "prompts" / "factual.txt"), out=str(tmp_path), dtype="float32")
    ranks = Ranks(0, 1, torch.device("cpu"))
    run = Run(RunConfig(**settings, small_batches=True), hub.locate(str(folder), ""), ranks)
    assert run.engine == "local float32 cpu small batches"
    assert Run(RunConfig(**settings), run.source, ranks).engine == "local float32 cpu"
    jobs = [({"id": name, "question": name, "answers": ["x"]}, "on", 0) for name in ("q1", "q2")]
    given: dict[str, Any] = {}
    whole = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **more: given.update(more) or whole(*args, **more))
    model = run.base_model()
    model.model.norm.weight.data[0] = torch.nan
    monkeypatch.setattr(run, "base_model", lambda: model)
    with pytest.raises(NumericsError, match=f"draws: the logits of {re.escape(run.source.name)} are .* question q1"):
        run.draw(run.sampler("thinkon"), jobs, tmp_path / "samples.jsonl", "draws", 5, Sampling())
    vocabulary = run.tokenizer.get_vocab(with_added_tokens=True)
    unused = set(range(model.config.vocab_size)) - set(vocabulary.values())
    assert set(given["never"]) == unused and given["small_batches"] is True
    with pytest.raises(InputError, match="lower --max-new or --draw-max-new"):
        run._check_memory(1 << 20)
