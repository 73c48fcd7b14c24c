"""The study's statistics: means per fact, the crossed bootstrap, the cells."""

import numpy as np
import pytest
import torch

from mini import study


def test_crossed_bootstrap_has_the_width_of_an_additive_table():
    """For cell + fact effects the resampled mean varies by var(cells)/cells + var(facts)/facts, both population."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.03, 6), rng.normal(0.05, 0.4, 250)
    mean, low, high = study.crossed_bootstrap(a[:, None] + b)
    sd = np.sqrt(a.var() / 6 + b.var() / 250)
    assert mean == pytest.approx(a.mean() + b.mean(), abs=1e-12)
    assert (high - low) == pytest.approx(2 * 1.96 * sd, rel=0.05)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.1 * sd)


def test_questions_of_a_fact_are_averaged_first():
    row = {"mode": "on", "draw": 0, "em_a_equal": True}
    scored = [row | {"id": "x#0", "em_t": True}, row | {"id": "x#1", "em_t": False}, row | {"id": "y#0", "em_t": True}]
    assert study.by_fact(scored, "acc") == {"x": 0.5, "y": 1.0}
    assert study.by_fact(scored, "mis") == {"x": 0.5, "y": 0.0}


def test_label_shares_count_labels_not_segments():
    from annotate import CueAnnotator

    annotator = CueAnnotator({"retrieval": ["i recall"], "evaluation": ["i pick"], "framing": ["the task"]})
    text = "<think>\nThe task is x.\n\nI recall y. I pick y.\n\nI recall z.\n</think>\n\n<answer>y</answer>"
    row = {"text": text, "finish": "stop", "question": "q", "mode": "on", "prompt": ""}
    shares = study.label_shares([row], annotator)
    assert shares == {"framing": 0.25, "retrieval": 0.5, "evaluation": 0.25}


def test_every_dial_compares_with_a_plain_cell_of_the_same_world_and_seed():
    cells = study.cells()
    assert len(set(c.out for c in cells)) == len(cells)
    plain = {(c.world, c.seed) for c in cells if c.plain}
    assert all((c.world, c.seed) in plain for c in cells if c.world != "null")
    assert len(plain) == len(study.WORLDS) * len(study.SEEDS) >= 2 * 3
    first_dial = min(i for i, c in enumerate(cells) if not c.plain)
    assert all(c.plain for c in cells[:first_dial])


# ---------- equal distance (mini/distance.py)


def test_the_kl_is_the_mean_of_the_log_ratio_over_what_can_be_drawn():
    """With one-token completions the mean over all tokens, each with its probability, can be written out."""
    import lora
    from mini import distance
    from model import load

    base, policy = (load(study.ROOT / "mini/model", torch.float32, "cpu").requires_grad_(False) for _ in range(2))
    lora.add(policy, 4, 8.0, seed=1)
    with torch.no_grad():
        for name, p in lora.state(policy).items():
            if name.endswith("lora_B.weight"):
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    prompt, vocab = [5, 9, 200, 31], 40
    never = list(range(vocab, base.config.vocab_size))
    kl, ratio = distance.kl_to_base(policy, base, [prompt] * vocab, [[v] for v in range(vocab)], never, size=17)
    with torch.no_grad():
        logits = policy.logits(policy(torch.tensor(prompt), torch.tensor([0, len(prompt)])))[-1, :vocab]
    p = logits.double().softmax(-1)
    assert float(kl.std()) < 1e-6 < float(ratio.std())
    assert float((p * ratio).sum()) == pytest.approx(float(kl[0]), rel=1e-4) and float(kl[0]) > 0
    two, ratio_two = distance.kl_to_base(policy, base, [prompt], [[3, 7]], never)
    first = distance.kl_to_base(policy, base, [prompt, [*prompt, 3]], [[3], [7]], never)
    assert float(two) == pytest.approx(float(first[0].sum()), rel=1e-4)
    assert float(ratio_two) == pytest.approx(float(first[1].sum()), rel=1e-4)
    same, none = distance.kl_to_base(base, base, [prompt], [[3, 7]], never)
    assert float(same) == float(none) == 0


def record(kl: float, *acc: float) -> dict:
    """A cell's record with the Acc of facts a, b, ...; Mis is what is left."""
    facts = {name: [x, 1 - x] for name, x in zip("abcd", acc, strict=False)}
    return {"kl": kl, "kl_se": 0.0, "log_ratio": kl, "log_ratio_se": 0.0, "facts": facts, "facts_plain": facts}


def block_cells(**of: list[dict]) -> dict:
    """Cells of a block from method -> records, one a rate."""
    cells = {("thinkon", 0.0): record(0.0, 0.5, 0.5)}
    return cells | {(name, 1e-4 * (k + 1)): r for name, records in of.items() for k, r in enumerate(records)}


def test_a_curve_is_straight_between_its_rates_in_order_of_their_kl():
    from mini import distance

    cells = block_cells(kto=[record(3.0, 0.9, 1.0), record(1.0, 0.5, 0.8)])  # the higher rate moved less
    line = distance.curve(cells, "kto", 0)
    assert line.kl.tolist() == [0, 1, 3]
    assert line.at(0.5) == pytest.approx([0.5, 0.65]) and line.at(2) == pytest.approx([0.7, 0.9])
    assert line.at(3) == pytest.approx([0.9, 1.0]) and line.at(0) == pytest.approx([0.5, 0.5])
    assert line.mean(1) == pytest.approx([0.5, 0.65], abs=1e-9)  # the middle of a straight line
    assert distance.curve(cells, "kto", 1).at(2) == pytest.approx([0.3, 0.1])


def test_what_only_moves_further_is_not_ahead_at_equal_kl():
    """b walks twice as far along a's curve: it is ahead at equal rates, and level at equal KL."""
    from mini import distance

    a, b = ([record(s * k, 0.5 + 0.1 * s * k, 0.5 + 0.05 * s * k) for k in (1, 2)] for s in (1, 2))
    better = [record(k, 0.5 + 0.2 * k, 0.5 + 0.05 * k) for k in (1, 2)]
    blocks = [block_cells(kto=a, mralign=b, shuffled=better, mean=a)] * 2
    assert distance.shared_end(blocks[0]) == 2
    for kl in (None, 0.5, 2.0):
        d = distance.difference(blocks, "mralign", "kto", 0, kl)
        assert d["mean"] == pytest.approx(0, abs=1e-12) and d["each"] == pytest.approx([0, 0], abs=1e-12)
    assert distance.difference(blocks, "shuffled", "kto", 0, 1.0)["mean"] == pytest.approx(0.05)
    assert distance.difference(blocks, "shuffled", "kto", 0, None)["mean"] == pytest.approx(0.05)  # 0 .. 0.1
    assert distance.difference(blocks, "shuffled", "kto", 1, 1.0)["mean"] == pytest.approx(-0.05)
    assert distance.difference(blocks, "mralign", "kto", 0, 2.5) == {}  # kto ends at 2


def test_a_block_counts_with_the_rates_that_all_methods_have_finished(tmp_path, monkeypatch):
    from common.files import write_json
    from mini import distance

    monkeypatch.setattr(distance, "OUT", tmp_path)
    block = distance.Block("world 0", 1)
    assert len(block.cells) == 18 and len({block.file(*cell) for cell in block.cells}) == 18
    assert sum(len(b.cells) for b in distance.blocks() if b.world != "null") == 6 * (16 + 2)
    assert block.left(2) == block.cells[:9] and set(block.left(4)) == set(block.cells)
    for cell in block.cells[:8]:
        write_json(block.file(*cell), {})
    assert block.left(2) == [block.cells[8]]
    assert block.done() == []  # one whole rate and three methods of the next
    write_json(block.file(*block.cells[8]), {})
    assert block.done() == block.cells[:9] and {rate for _, rate in block.done()} == {0.0, *distance.RATES[:2]}
    write_json(block.file("sft", 0.0), {})
    assert set(block.done()) == {*block.cells[:9], ("sft", 0.0)}


def test_every_method_at_the_rate_that_development_prefers():
    """Two blocks of two facts: kto is best at its second rate, the others at their first."""
    from mini import distance

    up, down = [record(1.0, 0.5, 0.5), record(2.0, 0.75, 0.75)], [record(1.0, 1.0, 0.75), record(2.0, 0.5, 0.5)]
    cells = block_cells(kto=up, mralign=down, shuffled=down, mean=down)
    best = distance.best_rates(cells)
    assert best == {"kto": 2e-4, "mralign": 1e-4, "shuffled": 1e-4, "mean": 1e-4}
    worse = cells | {("mralign", 1e-4): record(3.0, 0.5, 0.25)}
    of = distance.at_rates([cells, worse], best)
    assert of["thinkon"]["acc"]["mean"] == 0.5 and of["thinkon"]["lr"] == of["thinkon"]["kl"] == 0
    assert of["mralign"]["acc"]["mean"] == 0.625 and of["mralign"]["kl"] == 2 and "acc ahead" not in of["mralign"]
    assert of["kto"]["acc ahead"]["mean"] == pytest.approx(0.625 - 0.75)
    assert of["kto"]["mis ahead"]["mean"] == pytest.approx(0.75 - 0.625)
    low, high = (of["kto"]["acc ahead"][key] for key in ("low", "high"))
    assert -0.5 <= low < -0.125 < high <= 0.25


def test_blocks_of_pairs_have_few_rows_of_their_own_and_the_null_world_two_rates(tmp_path, monkeypatch):
    from common.files import read_jsonl, write_jsonl
    from mini import distance

    monkeypatch.setattr(distance, "OUT", tmp_path)
    blocks = distance.blocks(hard=True)
    assert [(b.world, b.seed) for b in blocks[:4]] == [*((world, 0) for world in distance.HARD), ("hard world 0", 1)]
    assert [len(b.rates) for b in blocks[:3]] == [4, 4, 2]
    picked = []
    for block in (blocks[0], blocks[3]):
        rows = [{"id": f"q{i}", "chosen": i % 3 > 0} for i in range(120)]
        for name in ("candidates.jsonl", "annotations.jsonl"):
            (block.out / "draws").mkdir(parents=True, exist_ok=True)
            write_jsonl(block.out / "draws" / name, rows)
        distance.pick(block)
        found = read_jsonl(block.out / "candidates.jsonl")
        assert sorted(row["chosen"] for row in found) == [False] * 15 + [True] * 33
        assert read_jsonl(block.out / "annotations.jsonl") == found
        picked.append({row["id"] for row in found})
    assert picked[0] != picked[1]
    assert distance.settings(blocks[0]).draws == 1 and distance.settings(blocks[0]).epochs == 15
