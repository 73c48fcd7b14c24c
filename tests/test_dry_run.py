"""The dry run: counts against the paper's and the benchmarks' own numbers, predictions against sums worked by hand."""

import json
import re
from pathlib import Path

import pytest
import torch

import mralign
import sample
from common.benchmarks import SOURCES
from common.errors import InputError
from common.files import read_json, write_jsonl
from common.settings import cli
from llm import labelling
from model import KVCache
from pipeline import dry_run, plan
from pipeline.config import RunConfig, check
from tools import fetch

ROOT = Path(__file__).resolve().parents[1]
BACKBONES = ("qwen3-8b", "qwen3-4b", "qwen3-14b", "r1-distill-qwen-7b", "nemotron-nano-4b")
BACKBONES += ("qwen3-32b", "qwen3-30b-a3b")
PAPER = ["--config", str(ROOT / "configs" / "qwen3-8b.json")]


def settings(*flags: object) -> RunConfig:
    return cli(RunConfig, [*PAPER, *map(str, flags)], "")[0]


def lines_of(text: str) -> dict[str, list[str]]:
    """phase -> cells of the table of phases, which comes after that of the memory."""
    text = text[text.index("| phase") :]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.fixture
def nothing(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder, without keys: what it prints, and that it leaves no file."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "DEEPSEEK_API_KEY", "SERPER_KEY"):
        monkeypatch.delenv(name, raising=False)

    def go(*flags: object) -> str:
        capsys.readouterr()
        assert mralign.main([*PAPER, "--dry-run", *map(str, flags)]) == 0
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    return go


def test_the_papers_run_is_counted_before_anything_was_fetched(nothing):
    """87,925 + 11,679 questions, 3 draws in 2 modes; 3,610 + 1,000 + 4,326 + 817 + 250 = 10,003 in the five sets."""
    out = nothing()
    rows = lines_of(out)
    assert rows["draws, thinking on"][0] == rows["draws, thinking off"][0] == "298,812 completions"  # 3 x 99,604
    eight = ("thinkoff", "thinkon", "refine", "sft", "kto", "mralign", "thinkon+ret", "mralign+ret")  # of Table 2
    assert {name: rows[f"eval {name}"][0] for name in eight} == {
        name: "20,006 completions" if name == "refine" else "10,003 completions" for name in eight
    }
    assert rows["labels of candidates, a: gpt-4o"][0] == "6,973 calls"  # Table 1
    assert rows["labels of evaluated thoughts, b: deepseek-chat"][0] == "3,908 calls"  # 977 of ThinkOn and 3 methods
    assert rows["search: questions"][0] == "10,003 searches" and rows["search: questions"][4] == "10.00"
    assert rows["judge: truthfulqa"][0] == "6,863 calls"  # 817 x 8 variants, a twentieth twice
    assert rows["train sft"][0] == "4,830 rows" and rows["train mralign"][0] == "6,973 rows"
    assert "committee: a gpt-4o@https://api.openai.com/v1, b deepseek-chat@" in out and "judge gpt-5@" in out
    assert "assumed: tokens of a prompt 120, thought 725, answer 60" in out and "prices of 2025-10-01" in out
    usd = [float(row[4]) for name, row in rows.items() if name != "all" and row[4] != "–"]
    assert float(rows["all"][4]) == pytest.approx(sum(usd), abs=0.1)
    hours = [float(row[3]) for name, row in rows.items() if name != "all" and row[3] != "–"]
    assert float(rows["all"][3]) == pytest.approx(sum(hours), abs=0.1)


def test_what_needs_no_server_costs_nothing(nothing):
    out = nothing("--annotator", "cues", "--judge", "", "--search", "", "--also", "refine", "--questions", "")
    assert "annotator       cues (mini/cues.json): no calls, no cost" in out
    rows = lines_of(out)
    assert not [name for name in rows if name.startswith(("labels", "judge", "search", "draws"))]
    assert rows["all"][4] == "0.00"


def test_a_file_that_is_there_is_counted(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"id": str(k), "question": "q?", "answers": ["a"], "dataset": "sciq" if k else "own"} for k in range(5)]
    write_jsonl(path, rows)
    of = dry_run.questions_of(str(path))
    assert (of.n, of.datasets, of.there) == (5, {"own": 1, "sciq": 4}, True)
    chosen, rejected = dry_run.candidates_of(of)  # four questions of SciQ's yield, one of that of all
    assert chosen == pytest.approx(4 * 760 / 11_679 + 4830 / 90_847)
    assert rejected == pytest.approx(4 * 358 / 11_679 + 2143 / 90_847)
    both = dry_run.questions_of("nowhere/nq_open+sciq-train.jsonl")
    assert both.n == 87_925 + 11_679 and dry_run.candidates_of(both) == (4830, 2143) and not both.there
    other = dry_run.Set(90_847, {"own": 90_847}, "short", True)  # as many questions as the paper's, as many rows
    assert dry_run.candidates_of(other) == pytest.approx((4830, 2143))
    with pytest.raises(InputError, match="no such file, and not called SET-SPLIT.jsonl .*give your questions"):
        dry_run.questions_of("nowhere/own.jsonl")


def test_lengths_are_those_of_the_draws_once_there_are_some(tmp_path):
    assert dry_run.drawn_lengths(tmp_path) == {"on": (120, 785), "off": (120, 60)}
    drawn = [("on", 10, 100), ("on", 30, 200), ("off", 7, 9)]
    rows = [{"mode": m, "prompt_ids": [0] * p, "ids": [0] * c} for m, p, c in drawn]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    assert dry_run.drawn_lengths(tmp_path) == {"on": (20, 150), "off": (7, 9)}


def test_cache_rows_and_time_of_sampling_by_hand():
    """Qwen3-8B: 36 layers x 8 heads x 128 x (K and V) x 2 bytes a token; 16.38 GB of weights on an A800 of 40 GB."""
    config, _ = plan.shape_of("Qwen/Qwen3-8B")
    how = dry_run.Decoding(config, 8_190_735_360, 2, "a800-40")
    assert how.cache_per_token == 36 * 8 * 128 * 2 * 2
    block = KVCache.bytes(config, 8192, torch.bfloat16, "cpu")
    assert how.cache_per_token * 8192 == block  # what the sampler itself reserves
    free = 0.92 * 40e9 - 2 * 8_190_735_360
    assert how.rows(8312) == int(sample.CACHE_SHARE * free / (147_456 * 8312)) == 13
    assert dry_run.Decoding(config, 8_190_735_360, 2, "rtx4090").rows(8312) > 0
    assert dry_run.Decoding(config, 16_000_000_000, 2, "rtx4090").rows(100) == 0  # the weights alone do not fit
    # one row, no prompt to speak of: each token reads all weights once at 60 % of 1,555 GB/s
    assert how.seconds(1, 0, 100, 1) == pytest.approx(100 * 16.38147e9 / (1555e9 * 0.6), rel=1e-3)
    # very many rows: two operations a parameter and token at 35 % of 312 TFLOP/s, the prompt's too
    config = plan.shape_of("Qwen/Qwen3-8B")[0]
    many = dry_run.Decoding(config, 8_190_735_360, 2, "h200").seconds(1, 1000, 1, 100_000)
    assert many == pytest.approx(1001 * 2 * 8.190735e9 / (989e12 * 0.35), rel=0.1)


def test_what_does_not_fit_is_said(nothing):
    assert "evaluation DO NOT FIT on a rtx4090" in nothing("--model", "Qwen/Qwen3-14B", "--gpu", "rtx4090")
    assert "DO NOT FIT" not in nothing("--gpu", "h100")


def test_what_does_not_fit_is_what_the_run_refuses(nothing):
    """Qwen3-8B in bfloat16: 16.38 GB of weights; a row's cache of 147,456 bytes a token, a quarter on top (1 / 0.8)."""
    config, _ = plan.shape_of("Qwen/Qwen3-8B")
    assert 42_000 > (24e9 - 2 * 8_190_735_360) * 0.8 / 147_456 > 40_960  # tokens of one row on 24 GB, in blocks of 512
    out = nothing("--gpu", "rtx4090", "--max-new", 40_700)
    assert "DO NOT FIT" not in out and "REFUSED" not in out
    out = nothing("--gpu", "rtx4090", "--max-new", 42_000)
    with pytest.raises(InputError) as refused:
        sample.check_memory(config, torch.bfloat16, 42_120, int(24e9), "--max-new")
    assert f"evaluation DO NOT FIT on a rtx4090: {refused.value}\n" in out
    told = "evaluation would be REFUSED: --max-new 42,000 and a prompt of assumed length, 120 tokens, exceed the "
    assert told + "model's 40,960 positions (max_position_embeddings); set --max-new to 40,840 or less" in out


def test_training_rows_are_counted_from_the_questions_that_are_there(tmp_path, capsys):
    """3 questions keep 0.16 and 0.07 rows; 300 keep 300 * 4830 / 90847 = 16 and 300 * 2143 / 90847 = 7."""
    for n, words in ((3, "0.1595 chosen, 0.07077 rejected"), (300, "15.95 chosen, 7.077 rejected")):
        write_jsonl(tmp_path / "own.jsonl", [{"id": str(k), "question": "q?", "answers": ["a"]} for k in range(n)])
        flags = ["--model", "Qwen/Qwen3-8B", "--questions", str(tmp_path / "own.jsonl"), "--annotator", "self"]
        assert mralign.main([*flags, "--out", str(tmp_path / "run"), "--method", "sft,kto", "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert words in out and ("too few to train on" in out) is (n == 3)
        counts = {name: int(cells[0].split()[0]) for name, cells in lines_of(out).items() if name.startswith("train")}
        assert counts == ({"train sft": 0, "train kto": 0} if n == 3 else {"train sft": 16, "train kto": 23})
        assert ("rows       23: 16 chosen, 7 rejected" in out) is (n == 300)
    row = {"id": "a", "question": "q?", "answers": ["a"], "completion": "x", "spans": [[0, 1]]}
    made = [row | {"id": str(k), "chosen": k < 3, "prompt_ids": [1] * 5, "completion_ids": [1] * 7} for k in range(4)]
    write_jsonl(tmp_path / "run/candidates.jsonl", made)
    assert mralign.main([*flags, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "rows       4: 3 chosen, 1 rejected" in out and "rows of 12 to 12" in out


def test_the_hours_of_labels_by_the_model_itself(nothing, tmp_path):
    """As many completions as thoughts, in the draws' arithmetic; a second model and the adjudicator add theirs."""
    rows = lines_of(nothing("--annotator", "self"))
    (name,) = (name for name in rows if name.startswith("labels of candidates"))
    made = dry_run.made_up()
    written = 6973 * 55 * sum(len(row["spans"]) for row in made) / 48
    assert name == "labels of candidates, a: Qwen3-8B" and rows[name][0] == "6,973 completions"
    assert int(rows[name][2].replace(",", "")) == pytest.approx(written, rel=1e-6)
    config, _ = plan.shape_of("Qwen/Qwen3-8B")
    how = dry_run.Decoding(config, 8_190_735_360, 2, "a800-40")
    prompt = int(rows[name][1].replace(",", "")) / 6973
    hours = how.seconds(6973, prompt, written / 6973, how.rows(prompt + 4096)) / 3600 / 4
    assert float(rows[name][3]) == pytest.approx(hours, abs=0.006) and hours > 0.1 and rows[name][4] == "–"
    both = lines_of(nothing("--annotator", "self", "--annotator-model", "Qwen/Qwen3-4B"))
    three = [name for name in both if name.startswith("labels of candidates")]
    assert [name.rpartition(", ")[2] for name in three] == ["a: Qwen3-8B", "b: Qwen3-4B", "judge: Qwen3-8B"]
    assert float(both[three[1]][3]) < float(both[three[0]][3]) < float(both[three[2]][3])


def test_labels_cost_what_the_committee_would_be_asked(tmp_path):
    """Of the candidates themselves once they are there: four bytes a token, 55 tokens a segment, the listed price."""
    cfg = settings("--out", tmp_path, "--label-eval", 0)
    rows = dry_run.made_up()
    write_jsonl(tmp_path / "candidates.jsonl", rows)
    a, b, judge = dry_run.label_needs(cfg, None, "h100", 4)
    assert (a.units, b.units, judge.units) == (48, 48, 48)
    assert a.written == 55 * sum(len(row["spans"]) for row in rows) == 55 * 4 * sum(range(4, 16))
    prices = read_json(ROOT / "prices.json")["models"]
    assert a.usd == pytest.approx((a.read * prices["gpt-4o"]["input"] + a.written * prices["gpt-4o"]["output"]) / 1e6)
    assert b.usd == pytest.approx((b.read * 0.28 + b.written * 0.42) / 1e6)
    assert "calls.jsonl" not in [p.name for p in tmp_path.rglob("*")]
    thoughts = [sum(len(row["completion"][a:b]) for a, b in row["spans"]) // 4 for row in rows]
    assert min(thoughts) > 440 and max(thoughts) < 1010 and 700 < sum(thoughts) / 48 < 750


def test_a_judged_long_answer_asks_for_its_claims_and_their_evidence():
    cfg = settings("--eval-sets", "longfact=nowhere/longfact-test.jsonl", "--also", "", "--method", "kto")
    sets = {"longfact": dry_run.questions_of("nowhere/longfact-test.jsonl")}
    probe, claims, support = dry_run.judge_needs(cfg, sets)
    assert (probe.units, claims.units, support.units) == (20, 250 * 3 * 20, 250 * 3 * 16)  # three variants
    (searched,) = dry_run.search_needs(cfg, sets)
    assert searched.units == 250 * 3 * 16 and searched.usd == pytest.approx(12.0)  # a dollar a thousand


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbones_config_holds_the_whole_of_table_2(name, tmp_path, monkeypatch):
    """Its eight settings on its five sets, with files that tools.fetch knows; refused in one line without keys."""
    cfg = cli(RunConfig, ["--config", str(ROOT / "configs" / f"{name}.json")], "")[0]
    table2 = ("thinkoff", "thinkon", "refine", "sft", "kto", "mralign", "thinkon+ret", "mralign+ret")
    assert sorted(cfg.variants) == sorted(table2)
    assert [path for path in cfg.eval_paths.values()] == [
        f"data/{s}-test.jsonl" for s in ("nq_open", "sciq", "simpleqa", "truthfulqa", "longfact")
    ]
    assert set(SOURCES["nq_open"].paper.split()) >= set(table2)
    monkeypatch.chdir(tmp_path)
    wanted = {path.name for path, _, _ in fetch.missing(str(ROOT / "configs" / f"{name}.json"))}
    assert wanted == {Path(p).name for p in (cfg.questions, *cfg.eval_paths.values())}
    assert (cfg.judge.partition("@")[0], cfg.search, cfg.label_eval) == ("gpt-4o", "serper", 977)  # A.2, 4.1, 4.4
    committee = [e.model for e in labelling.endpoints(cfg).values()]
    assert committee == ["gpt-4o", "deepseek-chat", "gpt-5"] and cfg.labelled_sets == ["nq"]
    (tmp_path / "prompts").symlink_to(ROOT / "prompts")
    with pytest.raises(InputError, match="nq_open.sciq-train.jsonl: no such file.*tools.fetch --for CONFIG"):
        check(cfg)
    (tmp_path / "data").mkdir()
    for path in (cfg.questions, *cfg.eval_paths.values()):
        Path(path).write_text(json.dumps({"id": "1", "question": "q?", "answers": ["a"]}) + "\n")
    for variable in ("OPENAI_API_KEY", "DEEPSEEK_API_KEY", "SERPER_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match="export OPENAI_API_KEY DEEPSEEK_API_KEY SERPER_KEY, or do without: "):
        check(cfg)
    with pytest.raises(InputError, match="--search '' --also 'refine'"):
        check(cfg, ["search"])
    free = ["--judge", "", "--search", "", "--also", "refine", "--annotator", "self"]
    check(cli(RunConfig, ["--config", str(ROOT / "configs" / f"{name}.json"), *free], "")[0])  # what the message says


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "ktoo"], "--method 'ktoo' is not one of sft, kto"),
        (["--eval-sets", "test"], "--eval-sets 'test' must look like name=path.jsonl"),
        (["--eval-sets", "../esc=a.jsonl"], "'../esc=a.jsonl': the name may hold letters"),
        (["--eval-sets", "=a.jsonl"], "the name may hold letters"),
        (["--eval-sets", ".=a.jsonl"], "the name may hold letters"),
        (["--eval-sets", "a=x.jsonl,a=y.jsonl"], "--eval-sets names 'a' twice"),
        (["--gpus", "0"], "--gpus is 0, must be at least 1"),
    ],
)
def test_what_names_nothing_is_refused(flags, words, tmp_path, capsys):
    """As a run refuses it: a set's name is a folder's under --out."""
    assert mralign.main([*PAPER, "--dry-run", "--out", str(tmp_path), *flags]) == 3
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nonsense"], "unknown stage 'nonsense'"),
        (["--redo", "nope"], "unknown stage 'nope'"),
        (["--annotator", ""], "--annotator is not set"),
        (["--annotator", "gpt"], "--annotator is 'gpt', must be self, committee"),
        (["--annotator", "self", "--annotator-model", "x", "--also", "nope"], "--also 'nope' is not one of"),
        (["--annotator", "cues", "--annotator-model", "x"], "--annotator-model is the second model"),
        (["--annotator", "cues", "--cues", "nofile.json"], "nofile.json: no such file"),
        (["--search", "nofile.jsonl"], "--search nofile.jsonl: no such file"),
        (["--backend", "openai"], "--backend openai and --base-url"),
        (["--backend", "openai", "--base-url", "foo"], "an endpoint must look like"),
        (["--judge-max-tokens", "0"], "--judge-max-tokens is 0"),
        (["--judge-sets", "nowhere"], "--judge-sets 'nowhere' is not one of --eval-sets"),
        (["--claims-k", "-3"], "--claims-k is -3"),
        (["--reuse-from", "no/such"], "--reuse-from no/such: no such folder"),
        (["--min-segments", "9", "--max-segments", "3"], "--min-segments 9 is above --max-segments 3"),
        (["--min-think-tokens", "9", "--max-think-tokens", "3"], "--min-think-tokens 9 is above"),
        (["--method", ","], "--method is empty"),
        (["--method", "kto,kto"], "--method 'kto' is not one of .*, each once"),
        (["--seed", str(2**64)], "--seed is .*, must be a number within"),
        (["--lr", "1e300"], "--lr is 1e[+]300, must be a number within"),
    ],
)
def test_a_dry_run_refuses_the_settings_that_the_run_refuses(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for dry in (["--dry-run"], []):
        assert mralign.main([*PAPER, *flags, *dry]) == 3
        found = capsys.readouterr()
        assert re.search(message, found.err) and found.err.count("\n") == 1 and found.out == ""
