"""The miniature: sound facts, disjoint splits, traces whose labels can be read back, checkpoints that load."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
import em
import model as qwen3
from common.files import read_json, read_jsonl
from common.model_config import ModelConfig
from common.template import ChatTemplate
from common.tokens import encode, load_tokenizer
from mini import build
from mini.world import BODIES, CAREFUL, CARELESS, GOLD, MIN_SEGMENTS, NONE, World, consequence, load_facts

MINI = Path(build.__file__).parent
SPLITS = ("train", "dev", "test", "ood")
MODELS = sorted(path.parent for path in MINI.glob("model*/config.json"))
FACTS = load_facts()
CUES: dict[str, list[str]] = read_json(MINI / "cues.json")
WORDING = read_json(MINI / "wording.json")


def questions(split: str) -> list[dict]:
    return read_jsonl(MINI / "questions" / f"{split}.jsonl", ("id", "dataset", "question", "answers"))


def flat(text: str) -> str:
    """Lower case letters and digits, single spaces; written apart from data.normalise and annotate."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


PHRASES = {f" {flat(cue)} ": label for label, cues in CUES.items() for cue in cues}


@pytest.fixture(scope="module")
def traces() -> dict[bool, list]:
    """Two traces of every fact, from world 0 and from its null twin."""
    found = {}
    for null in (False, True):
        world, rng = World(0, null), random.Random(5)
        asked = [(fact, world.question(rng, fact)[0]) for fact in world.facts for _ in range(2)]
        found[null] = [(fact, world.think_on(rng, fact, opener)) for fact, opener in asked]
    return found


# ---------- facts and questions


def test_facts_are_distinct_and_no_text_contains_another():
    assert len({f.id for f in FACTS}) == len(FACTS) == len({(f.relation, f.subject) for f in FACTS})
    for f in FACTS:
        s, gold, wrong = (t.lower() for t in (f.subject, f.object, f.distractor))
        assert len(gold) >= 4 and len(wrong) >= 4 and (f.subject + f.object + f.distractor).isascii(), f
        assert gold not in wrong and wrong not in gold and gold not in s and wrong not in s, f
        assert f.source and f.split in SPLITS


def test_known_truths_are_there():
    known = {
        "capital/France": "Paris", "currency/Kenya": "Shilling", "symbol/Au": "Gold", "atomic_number/8": "Oxygen",
        "state_capital/Texas": "Austin", "tld/.fr": "France", "dial/+254": "Kenya", "language_code/fi": "Finnish",
        "city_country/Chicago": "United States", "iata/BOM": "Mumbai", "us_city/Miami": "Florida",
        "region/Japan": "Eastern Asia", "official_language/Brazil": "Portuguese", "province/Michigan": "United States",
    }  # fmt: skip
    have = {f.id: f.object for f in FACTS}
    assert {name: have[name] for name in known} == known


def test_splits_share_no_fact_and_out_of_domain_shares_no_relation():
    by_id = {f.id: f for f in FACTS}
    facts = {split: {q["id"].rsplit("#", 1)[0] for q in questions(split)} for split in SPLITS}
    assert sum(len(ids) for ids in facts.values()) == len(set().union(*facts.values())) == len(FACTS)
    relations = {split: {by_id[i].relation for i in ids} for split, ids in facts.items()}
    assert not relations["ood"] & (relations["train"] | relations["dev"] | relations["test"])
    assert relations["test"] == relations["train"] == relations["dev"]
    assert len(facts["train"]) == len(questions("train")) == 1000
    for split, ids in facts.items():
        assert {by_id[i].split for i in ids} == {split}


def test_questions_ask_for_their_fact_and_do_not_give_it_away():
    by_id, seen = {f.id: f for f in FACTS}, Counter()
    for split in SPLITS:
        for q in questions(split):
            fact = by_id[q["id"].rsplit("#", 1)[0]]
            seen[q["question"]] += 1
            assert q["dataset"] == "mini" and q["answers"] == [fact.object] and fact.subject in q["question"]
            assert flat(fact.object) not in flat(q["question"]), q
            assert flat(fact.distractor) not in flat(q["question"]), q
    assert max(seen.values()) == 1


def test_no_answer_hides_in_the_words_every_trace_may_use():
    words = [body for named in BODIES.values() for bodies in named for body in bodies]
    words += [cue for cues in CUES.values() for cue in cues] + [w["kind"] for w in WORDING["relations"].values()]
    text = " | ".join(flat(re.sub(r"\{.\}", " ", w)) for w in words)
    for f in FACTS:
        assert flat(f.object) not in text and flat(f.distractor) not in text, f


# ---------- cues and traces


def test_cues_cover_the_labels_and_none_is_inside_another():
    assert set(CUES) == set(BODIES) and set(CUES) <= set(em.LABELS)
    cues = [flat(cue) for phrases in CUES.values() for cue in phrases]
    assert len(set(cues)) == len(cues) == 45
    padded = [f" {cue} " for cue in cues]
    assert not [(a, b) for a in padded for b in padded if a != b and a in b]
    other = [t for f in FACTS for t in (f.subject, f.object, f.distractor)]
    other += [t for w in WORDING["relations"].values() for t in (w["kind"], *w["questions"], *w["statements"])]
    other += WORDING["openers"] + [body for named in BODIES.values() for bodies in named for body in bodies]
    for text in {f" {flat(t)} " for t in other}:
        assert not [cue for cue in padded if cue in text], text


def read_labels(segment: str) -> list[str]:
    """Labels of the cues of a segment in the order they stand there."""
    text = f" {flat(segment)} "
    found = [(text.find(cue), label) for cue, label in PHRASES.items()]
    return [label for place, label in sorted(found) if place >= 0]


@pytest.mark.parametrize("null", [False, True])
def test_labels_are_read_back_from_the_text(traces, null):
    used = Counter()
    for _, trace in traces[null]:
        thought = trace.completion.split("<think>\n")[1].split("\n</think>")[0]
        assert [read_labels(s) for s in thought.split("\n\n")] == trace.segment_labels
        assert sum(trace.segment_labels, []) == trace.labels
        used.update(trace.labels)
    assert set(used) == set(CUES) and min(used.values()) > 0.01 * sum(used.values())
    merged = [len(labels) == 2 for _, trace in traces[null] for labels in trace.segment_labels]
    assert 0.05 < sum(merged) / len(merged) < 0.2


def test_trace_shape(traces):
    for _, trace in traces[False] + traces[True]:
        assert MIN_SEGMENTS <= len(trace.segments) <= 12 and len(trace.candidates) == len(trace.labels)
        assert "retrieval" in trace.labels[:3] and trace.candidates[-1] != NONE
        for before, after in zip(["", *trace.labels], trace.labels, strict=False):
            assert after in (CARELESS if trace.careless else CAREFUL)[before] or after == "retrieval"


def test_the_answer_is_the_candidate_named_last(traces):
    for fact, trace in traces[False] + traces[True]:
        thought = " ".join(trace.segments)
        last = {name: thought.rfind(name) for name in (fact.object, fact.distractor)}
        assert trace.answer == max(last, key=last.get)
        parsed = data.parse(trace.completion)
        assert (parsed.outcome, parsed.answer) == ("ok", trace.answer)
        assert len(data.split_segments(trace.completion, *parsed.span)) == len(trace.segments)


def rate(chosen: list) -> float:
    return sum(trace.candidates[-1] != GOLD for _, trace in chosen) / len(chosen)


def test_careless_moves_lose_the_fact_in_a_world_and_nothing_does_in_a_null_world(traces):
    for null in (False, True):
        careless = [x for x in traces[null] if x[1].careless]
        careful = [x for x in traces[null] if not x[1].careless]
        turned = [x for x in traces[null] if "backtracking" in x[1].labels]
        straight = [x for x in traces[null] if "backtracking" not in x[1].labels]
        if null:  # 4 standard errors of a difference of rates near 0.3 between about 900 and 2,500 traces is 0.07
            assert abs(rate(careless) - rate(careful)) < 0.07 and abs(rate(turned) - rate(straight)) < 0.07
        else:
            assert 0.78 < rate(careless) < 0.95 and rate(careful) < 0.05
            assert rate(turned) > 3 * rate(straight)
    assert abs(rate(traces[False]) - rate(traces[True])) < 0.06


def test_most_wrong_traces_name_the_gold_and_drop_it(traces):
    for null in (False, True):
        wrong = [(fact, t) for fact, t in traces[null] if t.candidates[-1] != GOLD]
        assert sum(fact.object in " ".join(t.segments) for fact, t in wrong) > 0.85 * len(wrong)


def test_consequences_by_hand():
    rng = random.Random(0)
    lost = [consequence(rng, "retrieval", "backtracking", GOLD) for _ in range(2000)]
    assert 0.89 < lost.count("wrong") / 2000 < 0.95
    found = [consequence(rng, "backtracking", "retrieval", "wrong") for _ in range(2000)]
    assert 0.81 < found.count(GOLD) / 2000 < 0.89
    for label in set(BODIES) - {"backtracking", "evaluation"}:
        assert consequence(rng, "retrieval", label, GOLD) == GOLD
    assert consequence(rng, "synthesis", "evaluation", GOLD) == GOLD
    assert consequence(rng, "framing", "decomposition", NONE) == NONE


def test_worlds_repeat_by_seed_and_differ_between_seeds():
    assert World(0).hidden == World(0).hidden
    assert World(0).hidden != World(1).hidden
    moods = World(0).moods.values()
    assert all(m.trap == m.fault for m in moods) and sum(m.trap > 0.8 for m in moods) == 8
    null = World(0, null=True).moods.values()  # 8 of 28 openers have a fault, and so have 2 of the 7 traps
    assert [sum(m.fault > 0.8 for m in null), sum(m.trap > 0.8 for m in null)] == [8, 7]
    assert sum(m.trap > 0.8 and m.fault > 0.8 for m in null) == 2


# ---------- training rows


def test_loss_falls_on_completions_only():
    folder = MODELS[0]
    tokenizer, world = load_tokenizer(folder), World(0)
    ids, cu_seqlens, learn = next(build.batches(world, tokenizer, seed=3))
    stream = build.documents(world, random.Random("documents/3"))
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        prompt, completion = next(stream)
        assert tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False) == prompt + completion
        learnt = ids[start + 1 : stop][learn[start : stop - 1]].tolist()
        if prompt:
            assert tokenizer.decode(learnt, skip_special_tokens=False) == completion
        else:  # the first token of a statement has nothing before it
            assert learnt == ids[start + 1 : stop].tolist()
        assert not learn[stop - 1]


def test_training_repeats_bit_for_bit():
    tokenizer, world = load_tokenizer(MODELS[0]), World(0)
    config = ModelConfig.from_json(MODELS[0] / "config.json")
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        net = qwen3.Qwen3(config)
        build.train(net, build.batches(world, tokenizer, 0), steps=2)
        weights.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


# ---------- the checkpoints


def test_there_is_a_default_model_and_all_of_it_is_small():
    assert MINI / "model" in MODELS
    size = lambda folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")  # noqa: E731
    assert all(size(folder) <= 3_000_000 for folder in MODELS) and size(MINI) <= 16_000_000


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    world, rng = World(0), random.Random(2)
    for fact in world.facts[::100]:
        opener, question = world.question(rng, fact)
        text = build.prompt(f"{opener} {question}", True) + world.think_on(rng, fact, opener).completion
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    for text in ("Zürich, 東京\r\n\r\n  x\n\n\n", "a" * 50):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("Paris.\n\nSo").ids) == len(tokenizer.encode("Paris").ids) + 2  # ".\n\n" is one token
    assert ".ĊĊ" in tokenizer.get_vocab()
    for token in ("<|im_end|>", "<think>", "</answer>"):
        assert len(tokenizer.encode(token).ids) == 1


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_transformers_loads_the_same_model_and_prompt(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    own, tokenizer = qwen3.load(folder), load_tokenizer(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate(folder)
    world, rng = World(0), random.Random(4)
    for fact in world.facts[::400]:
        opener, question = world.question(rng, fact)
        turn = [{"role": "user", "content": question}]
        for thinking in (True, False):
            text = build.prompt(question, thinking)
            rendered = auto.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            assert text == rendered == template.prompt(question, thinking)
            ids = encode(tokenizer, text)
            assert ids == auto(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(encode(tokenizer, text + world.think_on(rng, fact, opener).completion))
        with torch.no_grad():
            expected = theirs(ids[None]).logits[0]
            found = own.logits(own(ids, torch.tensor([0, len(ids)])))
        assert (found - expected).abs().max() < 1e-4
    ends = [auto.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert theirs.generation_config.eos_token_id == ends
    assert own.config.eos_token_id == auto.eos_token_id
