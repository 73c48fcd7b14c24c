"""The dry run against exact counts, against what a backward pass really keeps, and on every shipped configuration."""

import dataclasses
from pathlib import Path

import pytest
import torch

import lora
import model as qwen
import mralign
import train
from common import costs
from common.errors import InputError
from common.files import write_json, write_jsonl
from common.model_config import ModelConfig
from common.settings import cli
from common.tokens import encode
from pipeline import dry_run, plan
from pipeline.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.json") if "ablations" not in p.stem and "masa" not in p.stem)
SHAPES = sorted((ROOT / "configs" / "shapes").glob("*.json"))

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    max_position_embeddings=512,
    eos_token_id=0,
)


def config_of(path: Path) -> RunConfig:
    return cli(RunConfig, ["--config", str(path)], "")[0]


def test_the_papers_runs_are_tables_13_and_14():
    """4 GPUs x 2 rows x 8 micro-batches, lr 5e-6 and 1e-4, 3 epochs, warm-up 0.1, rank 32, beta 0.1, 1 and 1.5."""
    models = {
        "qwen3-8b": "Qwen/Qwen3-8B",
        "qwen3-4b": "Qwen/Qwen3-4B",
        "qwen3-14b": "Qwen/Qwen3-14B",
        "r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "nemotron-nano-4b": "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1",
        "qwen3-32b": "Qwen/Qwen3-32B",  # not in the paper, with its settings
        "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    }
    assert {p.stem for p in CONFIGS} == {*models, "mini", "mini-report"}
    for name, model in models.items():
        c = config_of(ROOT / "configs" / f"{name}.json")
        assert c.model == model and c.batch_size == 4 * 2 * 8
        assert (c.micro_tokens, c.micro_batch, c.recompute) == (0, 0, "auto")  # the program chooses
        assert (c.lr, c.sft_lr, c.epochs, c.warmup, c.lora_r, c.lora_alpha) == (5e-6, 1e-4, 3, 0.1, 32, 64.0)
        assert (c.beta, c.lambda_c, c.lambda_r, c.dtype) == (0.1, 1.0, 1.5, "bfloat16")
        assert (c.temperature, c.top_p, c.top_k, c.min_p, c.max_new) == (0.6, 0.95, 20, 0.0, 8192)  # Table 15
        assert (c.draws, c.draw_temperature, c.draw_top_p) == (3, 0.2, 0.9)  # 3.1.1
        assert (c.min_segments, c.max_segments, c.min_think_tokens, c.max_think_tokens) == (4, 15, 450, 1000)
        assert Path(c.prompt) == Path("prompts/factual.txt") and set(c.method.split(",")) == {"sft", "kto", "mralign"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_makes_a_dry_run(path, capsys):
    assert mralign.main(["--config", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "predicted, not measured" in out and "fits" in out


def test_sizes_of_the_public_models():
    """Parameters in billions as their makers give them; 87.3 M trained for Qwen3-8B at rank 32."""
    given = {
        "Qwen3-4B": 4.02,
        "Qwen3-8B": 8.19,
        "Qwen3-14B": 14.77,
        "DeepSeek-R1-Distill-Qwen-7B": 7.62,
        "Llama-3.1-Nemotron-Nano-4B-v1.1": 4.51,
        "Qwen3-32B": 32.76,
        "Qwen3-30B-A3B": 30.53,
        "Qwen3-235B-A22B": 235.09,
    }
    assert {p.stem for p in SHAPES} == set(given)
    for path in SHAPES:
        n = costs.parameters(ModelConfig.from_json(path), 32)
        assert (n["layers"] + n["rest"]) / 1e9 == pytest.approx(given[path.stem], abs=0.006), path.stem
    assert costs.parameters(plan.shape_of("Qwen/Qwen3-8B")[0], 32)["adapters"] == 87_293_952


def test_weights_adapters_and_optimiser_state_are_what_a_built_model_has():
    s = train.TrainSettings(lora_r=5, shard=False)
    model = qwen.Qwen3(SMALL).to(torch.bfloat16)
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = lora.add(model, 5, 10.0)
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    lengths = plan.Lengths([4] * 3, [6] * 3, [True, True, False])
    parts = plan.memory(SMALL, s, 2, "h100", 1, lengths)["none"]
    assert parts["frozen weights"] == base
    assert parts["adapters"] == sum(p.numel() * p.element_size() for p in trained)
    moments = sum(x.numel() * x.element_size() for st in optimizer.state.values() for x in st.values() if x.dim())
    assert parts["AdamW's moments"] == moments
    assert parts["gradients, twice"] == 2 * sum(p.grad.numel() * 4 for p in trained)
    sharded = plan.memory(SMALL, dataclasses.replace(s, shard=True), 2, "h100", 4, lengths)["none"]
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "lora_" not in n)
    assert sharded["frozen weights"] == base - 2 * layers * 3 / 4


def test_the_balance_of_the_classes_is_the_papers():
    """4830 / (1.5 * 2143) = 1.503; at lambda_r 1.0 it is 2.25, at 2.5 below 1."""
    lengths = plan.assumed_lengths()
    assert (len(lengths.chosen), sum(lengths.chosen)) == (6973, 4830)
    assert min(lengths.completion) == 510 and max(lengths.completion) == 1060
    text = "\n".join(plan.data_lines(lengths, train.TrainSettings(), "mralign"))
    assert "= 1.503, inside" in text and "steps      327" in text
    assert "= 2.254, OUTSIDE" in plan.data_lines(lengths, train.TrainSettings(lambda_r=1.0), "kto")[-1]
    assert "= 0.902, OUTSIDE" in plan.data_lines(lengths, train.TrainSettings(lambda_r=2.5), "kto")[-1]


def test_a_run_with_rows_shows_labels_weights_and_one_row_token_by_token(tmp_path, tiny_tokenizer):
    folder, out = tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    out.mkdir()
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", SMALL.to_json(torch.bfloat16))
    completion = "<think>\nIt is Paris.\n\nWait.\n</think>\n\nParis"
    spans = [[7, completion.index("Wait")], [completion.index("Wait"), completion.index("</think>")]]
    row = {"id": "q", "prompt": "Where?", "completion": completion, "label": True, "spans": spans}
    row |= {
        "prompt_ids": encode(tiny_tokenizer, "Where?"),
        "labels": [["retrieval"], ["retrieval", "backtracking"]],
    }
    row |= {"completion_ids": encode(tiny_tokenizer, completion), "w": [1.5, 0.5]}
    write_jsonl(out / "train.jsonl", [row, row | {"id": "r", "label": False}])
    given = dry_run.rows_of(RunConfig(model=str(folder), out=str(out)), None)
    text = plan.report_text(str(folder), given, "mralign", "bfloat16", train.TrainSettings(), "h100", 1)
    lines = text.splitlines()
    assert "rows       2: 1 chosen, 1 rejected" in lines
    assert f"tokens     {2 * (len(row['prompt_ids']) + len(row['completion_ids']))} an epoch" in text
    assert [line.split()[1] for line in lines if line.startswith("  retrieval")] == ["4"]
    assert [line.split()[1] for line in lines if line.startswith("  backtracking")] == ["2"]
    assert [line.split()[4] for line in lines if line.startswith("  w 0.47 to 0.61")] == ["2"]  # 0.5, in both rows
    assert [line.split()[4] for line in lines if line.startswith("  w 1.28 to 1.65")] == ["2"]
    shown = lines[lines.index("row q") + 1 :]
    assert shown[0].strip() == "not in the loss  'Where?'"
    weights = [(line.split()[1], line.split("  ", 2)[-1].strip()) for line in shown[1:]]
    assert [w for w, _ in weights] == ["1.000", "1.500", "0.500", "1.000"]
    joined = "".join(eval_free(piece.split("  ")[-1]) for _, piece in weights)
    assert joined == completion  # every token once, in order


def test_what_a_sharded_model_takes_of_the_host_is_said() -> None:
    """30,532,122,624 weights of two bytes are 61.06 GB, read by each of four processes: 244.3 GB. Else nothing."""
    given = plan.Rows(plan.assumed_lengths(2, 2), "made up", [])
    for sharded, lines in (
        (True, ["host       each of 4 processes first reads the whole model: 4 x 61.1 = 244 GB"]),
        (False, []),
    ):
        s = train.TrainSettings(shard=sharded)
        text = plan.report_text("Qwen3-30B-A3B", given, "mralign", "bfloat16", s, "h200", 4)
        assert [line for line in text.splitlines() if line.startswith("host")] == lines


def eval_free(literal: str) -> str:
    """The text of a Python string literal."""
    import ast

    return ast.literal_eval(literal)


def test_a_model_without_a_shape_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match="no folder with a config.json, and none of .*Qwen3-8B.*; put a config.json"):
        plan.shape_of(str(tmp_path / "nothing"))
