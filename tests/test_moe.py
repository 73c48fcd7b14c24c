"""moe.py against transformers' Qwen3MoeForCausalLM and PEFT; what a mixture changes in loading, sampling, training."""

import contextlib
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from peers import VOCAB, peer
from safetensors.torch import load_file, save_file
from test_costs import Alive
from test_export import Handler, truth
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import data
import lora
import model as qwen
import moe
import mralign
import sample
from common import costs
from common.errors import InputError
from common.files import read_jsonl, write_jsonl
from common.model_config import MixtureConfig, ModelConfig
from common.tokens import encode, load_tokenizer
from mini import build
from mini.world import World, wrap
from pipeline import dry_run, plan, room
from pipeline.config import RunConfig
from tools import export, routes


def tokens(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def packed(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat(rows), torch.tensor([0] + [len(row) for row in rows]).cumsum(0)


def block(experts: int = 6, k: int = 2, hidden: int = 64, inner: int = 32, normalised: bool = True) -> moe.MoE:
    torch.manual_seed(0)
    made = moe.MoE(MixtureConfig(experts, k, inner, normalised), hidden)
    for p in made.parameters():
        p.data.normal_(std=0.2)
    return made


def by_hand(m: moe.MoE, x: torch.Tensor) -> torch.Tensor:
    """A token after the other, an expert after the other, from the formula at the head of moe.py, in fp64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    gate_up, down, x = m.experts.gate_up_proj.double(), m.experts.down_proj.double(), x.double()
    for i, row in enumerate(x):
        p = (m.gate.weight.double() @ row).softmax(0)
        best = sorted(range(len(p)), key=lambda e: -p[e])[: m.k]
        total = sum(p[e] for e in best) if m.normalised else 1.0
        for e in best:
            gate, up = (gate_up[e] @ row).chunk(2)
            out[i] += p[e] / total * (down[e] @ (gate * torch.sigmoid(gate) * up))
    return out


# ---------- the block


@pytest.mark.parametrize(("experts", "k", "normalised"), [(6, 2, True), (6, 2, False), (5, 5, True), (3, 1, True)])
@torch.no_grad()
def test_the_block_is_its_formula(experts: int, k: int, normalised: bool) -> None:
    m = block(experts, k, normalised=normalised)
    x = torch.randn(50, 64)
    assert (m(x) - by_hand(m, x)).abs().max() <= 1e-5


@torch.no_grad()
def test_no_token_is_dropped_however_many_want_one_expert() -> None:
    """A router that sends all to expert 3 first: it gets every token, and the result is still the formula's."""
    m = block()
    m.gate.weight.zero_()
    m.gate.weight[3] = 1.0
    x = torch.rand(200, 64)
    with moe.recorded(m) as routes:
        y = m(x)
    assert (routes[0][:, 0] == 3).all()
    assert (y - by_hand(m, x)).abs().max() <= 1e-5


def test_rows_sorted_by_expert_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens, the first to experts 1 and 0, the second to 1 and 2; each expert fills up to two rows."""
    monkeypatch.setattr(moe, "ROWS", 2)
    source, place, ends = moe.sorted_rows(torch.tensor([[1, 0], [1, 2]]), 4)
    assert ends.tolist() == [2, 4, 6, 6] and ends.dtype == torch.int32
    assert source.tolist() == [0, 0, 0, 1, 1, 0]  # rows 1 and 5 fill up
    assert place.tolist() == [2, 0, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_and_the_loop_are_one(dtype: torch.dtype) -> None:
    """Values and both gradients; a group is empty. bf16: both sum in fp32 and round once."""
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(40, 64, generator=g), torch.randn(4, 32, 64, generator=g)
    ends = torch.tensor([7, 7, 39, 40], dtype=torch.int32)
    results = []
    for way in (moe.product, moe.product_by_loop):
        a, b = (t.to(dtype).requires_grad_() for t in (x, weight))
        assert moe.grouped_runs(a, b)
        y = way(a, b, ends)
        y.float().square().sum().backward()
        results.append((y, a.grad, b.grad))
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * other.abs().max()
    assert not results[0][2][1].any()


def test_sizes_that_the_grouped_product_does_not_take_go_by_the_loop() -> None:
    odd = block(hidden=20, inner=12).bfloat16()
    assert not moe.grouped_runs(odd.experts.down_proj, odd.experts.down_proj)
    x = torch.randn(30, 20).bfloat16()
    assert (odd(x) - by_hand(odd, x)).norm() <= 0.02 * by_hand(odd, x).norm()


def test_gradients_are_those_of_the_formula() -> None:
    m = block()
    x = torch.randn(30, 64, requires_grad=True)
    target = torch.randn(30, 64)
    names = ["x", *(name for name, _ in m.named_parameters())]
    got = torch.autograd.grad((m(x) * target).sum(), [x, *m.parameters()])
    expected = torch.autograd.grad((by_hand(m, x) * target).sum(), [x, *m.parameters()])
    for name, a, b in zip(names, got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_token_has_the_same_bits_whatever_is_beside_it(dtype: torch.dtype) -> None:
    """Alone with as many rows as sampling computes at least, among others, in another order, in a crowd."""
    m = block(experts=8, k=2, hidden=128, inner=64).to(dtype)
    x = torch.randn(300, 128).to(dtype)
    whole = m(x)
    for n in (sample.ROWS, 17, 33, 250):
        assert torch.equal(m(x[:n]), whole[:n]), n
    order = torch.randperm(300)
    assert torch.equal(m(x[order]), whole[order])
    crowd = torch.cat((x[:1].expand(500, -1), x))  # one expert gets 500 rows more
    assert torch.equal(m(crowd)[500:], whole)


# ---------- against transformers

SHAPES = {
    "128 experts of 8": dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=16, mlp_only_layers=[]),
    "every second layer": dict(decoder_sparse_step=2, mlp_only_layers=[]),
    "weights as they are": dict(norm_topk_prob=False),
    "one of all": dict(num_experts=2, num_experts_per_tok=1),
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["apart", "stacked"])
@torch.no_grad()
def test_logits_and_routes_equal_transformers(tmp_path: Path, changes: dict, layout: str) -> None:
    """Every row as transformers computes it alone, from both layouts; and the same experts in every layer."""
    hf = peer("qwen3_moe", **changes)
    hf.save_pretrained(tmp_path, save_original_format=layout == "apart")
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in names) is (layout == "stacked")
    m = qwen.load(tmp_path)
    rows = tokens(5, 1, 40)
    with moe.recorded(m) as routes:
        got = m.logits(m(*packed(rows)))
    start, experts = 0, hf.config.num_experts
    for row in rows:
        told = hf(row[None], output_router_logits=True)
        assert (got[start : start + len(row)] - told.logits[0]).abs().max() <= 1e-5
        assert len(told.router_logits) == len(routes)
        for theirs, ours in zip(told.router_logits, routes, strict=True):
            best = theirs.topk(hf.config.num_experts_per_tok).indices
            one, other = (F.one_hot(x, experts).sum(1) for x in (best, ours[start : start + len(row)]))
            assert torch.equal(one, other)
        start += len(row)


@torch.no_grad()
def test_peft_makes_the_same_of_our_adapter_and_of_our_merge(tmp_path: Path) -> None:
    """On attention of all layers and nowhere else; transformers with PEFT, and merged, have our logits."""
    peer("qwen3_moe").save_pretrained(tmp_path / "base")
    m = qwen.load(tmp_path / "base")
    generator = torch.Generator().manual_seed(2)
    for p in lora.add(m, r=4, alpha=8.0):
        p += 0.05 * torch.randn(p.shape, generator=generator)
    assert {name.rsplit(".", 3)[1] for name in lora.state(m)} == set(lora.ATTENTION)
    assert len(lora.state(m)) == 2 * 4 * 3
    assert [n for n, p in m.named_parameters() if p.requires_grad] == [
        n for n, _ in m.named_parameters() if "lora_" in n
    ]
    lora.save(m, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    rows = tokens(30, 4)
    expected = torch.cat([theirs.eval()(row[None]).logits[0] for row in rows])
    with_adapter = m.logits(m(*packed(rows)))
    assert (with_adapter - expected).abs().max() <= 2e-5
    with lora.disabled(m):
        assert (m.logits(m(*packed(rows))) - expected).abs().max() > 0.1
    lora.merge(m)
    qwen.save(m, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (torch.cat([merged(row[None]).logits[0] for row in rows]) - expected).abs().max() <= 2e-5


def test_an_adapter_on_experts_or_router_is_refused(tmp_path: Path) -> None:
    peer("qwen3_moe", mlp_only_layers=[]).save_pretrained(tmp_path)
    for target in ("gate_proj", "gate"):
        with pytest.raises(InputError, match=f"'{target}' names no linear layer.*k_proj"):
            lora.add(qwen.load(tmp_path), 2, 4.0, ("q_proj", target))


# ---------- checkpoints


def test_a_part_that_is_missing_extra_or_there_twice_is_named(tmp_path: Path) -> None:
    peer("qwen3_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.mlp.experts.4.up_proj.weight"
    stacked = "model.layers.0.mlp.experts.down_proj"
    for changed, words in (
        ({k: v for k, v in whole.items() if k != name}, [f"{name} is missing"]),
        (whole | {name.replace(".4.", ".6."): whole[name].clone()}, ["experts.6.up_proj.weight is extra"]),
        (whole | {name: whole[name].T.contiguous()}, [name, "of shape (48, 32), not (32, 48)"]),
        (whole | {stacked: torch.zeros(6, 48, 32)}, [f"{stacked} is there whole and in parts"]),
        ({k: v for k, v in whole.items() if "layers.0.mlp.experts" not in k}, [f"{stacked} is missing"]),
    ):
        save_file(changed, file)
        with pytest.raises(InputError) as error:
            qwen.load(tmp_path)
        assert all(word in str(error.value) for word in words), error.value
    assert str(error.value).count("is missing") == 2  # not a line an expert
    save_file({k: v for k, v in whole.items() if "experts" not in k or k.endswith("0.up_proj.weight")}, file)
    with pytest.raises(InputError, match="; and 4 more; use the matching files") as error:
        qwen.load(tmp_path)  # 22 matrices, and both stacked down_proj
    assert str(error.value).count("is missing") == 20


def config_with(path: Path, **changes: object) -> ModelConfig:
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "edited.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return ModelConfig.from_json(path / "edited.json")


def test_config_of_either_transformers_and_what_is_refused(tmp_path: Path) -> None:
    peer("qwen3_moe").save_pretrained(tmp_path)
    config = config_with(tmp_path)
    assert config.moe == MixtureConfig(6, 2, 32, True, 1, (1,))
    assert [config.moe.at(layer) for layer in range(3)] == [True, False, True]
    assert config_with(tmp_path, num_local_experts=..., num_experts=6) == config
    assert config_with(tmp_path, decoder_sparse_step=2, mlp_only_layers=None).moe.at(0) is False
    for changes, words in (
        ({"num_experts": 7}, ["num_experts is 7", "num_local_experts is 6"]),
        ({"num_local_experts": ...}, ["num_experts", "missing"]),
        ({"norm_topk_prob": ...}, ["norm_topk_prob", "missing"]),
        ({"num_experts": 10**12, "num_local_experts": ...}, ["num_experts", "1,000,000,000,000", "4,096"]),
        ({"num_experts_per_tok": 7}, ["num_experts_per_tok", "7 of 6"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size is 0"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob is 1"]),
        ({"mlp_only_layers": [3]}, ["mlp_only_layers", "[3]"]),
        ({"mlp_only_layers": 1}, ["mlp_only_layers is 1"]),
        ({"mlp_only_layers": False}, ["mlp_only_layers is False"]),
        ({"decoder_sparse_step": 4}, ["decoder_sparse_step", "no layer"]),
    ):
        with pytest.raises(InputError) as error:
            config_with(tmp_path, **changes)
        assert all(word in str(error.value) for word in words), error.value


# ---------- the plan

SMALL = ModelConfig(97, 64, 160, 4, 4, 2, 24, 1e-6, 1e4, False, 512, 0, "qwen3_moe")
SMALL = dataclasses.replace(SMALL, moe=MixtureConfig(4, 2, 48, True, 2))  # layers 1 and 3 have experts


def test_sizes_of_the_public_mixtures() -> None:
    """Billions of parameters, all and activated, as their makers give them: 30.5 and 3.3, 235 and 22."""
    for name, total, active in (("Qwen3-30B-A3B", 30.5, 3.3), ("Qwen3-235B-A22B", 235, 22)):
        n = costs.parameters(plan.shape_of(name)[0], 32)
        assert (n["layers"] + n["rest"]) / 1e9 == pytest.approx(total, rel=0.002)
        assert (n["layers"] + n["rest"] - n["idle"]) / 1e9 == pytest.approx(active, rel=0.02)
    n = costs.parameters(plan.shape_of("Qwen3-30B-A3B")[0], 32)
    assert n["experts"] == 48 * 128 * 3 * 2048 * 768 and n["idle"] == n["experts"] * 120 // 128
    assert n["adapters"] == 48 * 32 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048))


def test_costs_count_what_a_built_mixture_has_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in all and trained; multiplications by torch's own counter, with the causal half of attention."""
    model, T = qwen.Qwen3(SMALL), 64
    n = costs.parameters(SMALL, 5)
    assert n["layers"] + n["rest"] == sum(p.numel() for p in model.parameters())
    assert n["experts"] == sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert n["idle"] == n["experts"] // 2
    assert n["adapters"] == sum(p.numel() for p in lora.add(model, 5, 10.0))
    monkeypatch.setattr(moe, "product", moe.product_by_loop)  # the counter does not know the grouped one
    monkeypatch.setattr(moe, "ROWS", 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(97, (T,)), torch.tensor([0, T]))
    found = costs.forward_flops(SMALL, 5, [(T, 0)])
    assert found["head"] == 0
    masked = found["attention"] * (T - 1) / (T + 1)  # pairs that the counter counts and causal attention does not need
    assert sum(found.values()) + masked == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("recompute", costs.RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [True, False])
def test_what_a_layer_of_a_mixture_leaves_alive(experts: bool, dtype: torch.dtype, recompute: str) -> None:
    """As test_costs counts it for others: two more layers, with experts or without, leave so many bytes more."""
    alive, tokens = [], 128
    size = torch.finfo(dtype).bits // 8
    for layers in (4, 6):
        without = () if experts else tuple(range(1, layers))
        mixture = MixtureConfig(4, 2, 48, True, 1, without)
        config = dataclasses.replace(SMALL, num_hidden_layers=layers, moe=mixture)
        torch.manual_seed(0)
        model = qwen.Qwen3(config).to(dtype)
        lora.add(model, 5, 10.0)
        model.stack()
        model.recompute = recompute
        with Alive(model) as mode:
            hidden = model(torch.randint(97, (tokens,)), torch.tensor([0, tokens]))
        alive.append(mode.nbytes())
        del hidden
    casts = (size == 2 and recompute != "full") * costs.parameters(config, 5)["adapters"] // 6
    measured = (alive[1] - alive[0]) / 2 - size * casts
    predicted = costs.kept_per_token(config, 5, size, recompute, False, experts) * tokens
    assert predicted == pytest.approx(measured, rel=0.1), (predicted, measured)


def test_cheap_recomputation_gives_the_same_gradients(tmp_path: Path) -> None:
    peer("qwen3_moe").save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    trained = lora.add(m, r=4, alpha=8.0)
    for p in trained:
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for m.recompute in costs.RECOMPUTE:
        found.append(torch.autograd.grad(m(*packed(tokens(30, 12))).square().sum(), trained))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_token_decoded_reads_the_experts_that_its_batch_meets() -> None:
    """One row reads k of n experts; very many rows read all; multiplied are k of n, however many rows."""
    config, _ = plan.shape_of("Qwen3-30B-A3B")
    n = costs.parameters(config, 32)
    how = dry_run.Decoding(config, n["layers"] + n["rest"], 2, "h200", n["experts"])
    active = how.params - n["idle"]
    assert how.met(1) == active and how.met(10_000) == pytest.approx(how.params)
    assert how.seconds(1, 0, 100, 1) == pytest.approx(100 * 2 * active / (4800e9 * 0.6), rel=1e-3)
    assert how.seconds(1, 1000, 1, 100_000) == pytest.approx(1001 * 2 * active / (989e12 * 0.35), rel=0.1)


# ---------- larger than one card


def test_what_one_gpu_cannot_hold_is_refused_at_once_with_the_lines_to_type(monkeypatch, capsys) -> None:
    """Before anything is fetched: the stages, the sizes, vLLM over two cards and the same command with its address."""
    monkeypatch.setattr(room, "gpu_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr(mralign, "check", lambda *_: None)  # the files it names are not here
    monkeypatch.setattr(mralign.hub, "locate", lambda *_: pytest.fail("fetched"))
    config = str(Path(mralign.__file__).with_name("configs") / "qwen3-32b.json")
    assert mralign.main(["--config", config, "--max-new", "200000"]) == 3
    told = capsys.readouterr().err
    assert "sample, eval, report: Qwen/Qwen3-32B and one row of 200,000 tokens need" in told and told.count("\n") == 1
    assert "`vllm serve Qwen/Qwen3-32B --tensor-parallel-size 2`" in told
    again = f"python mralign.py --config {shlex.quote(config)} --max-new 200000 --backend openai"
    again += " --base-url http://127.0.0.1:8000/v1"
    assert f"`{again}`" in told and "--shard train" in told


def test_the_config_alone_is_fetched_of_a_model_whose_shape_is_not_known_here(tmp_path: Path, monkeypatch) -> None:
    """30.5 billion weights of two bytes, 56.9 GiB, are refused on a card of 40 GiB for the price of a small file."""
    asked = []

    def fetched(model: str, name: str, revision: str | None) -> str:
        asked.append((model, name, revision))
        return str(plan.SHAPES / "Qwen3-30B-A3B.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr(room, "gpu_bytes", lambda: 40 * 2**30)
    cfg = RunConfig(model="Qwen/Qwen3-30B-A3B-Later", revision="v1", dtype="bfloat16", out=str(tmp_path))
    with pytest.raises(InputError, match="A3B-Later and one row of .* need 57.*vllm serve Qwen/Qwen3-30B-A3B-Later"):
        room.check(cfg, ["sample"], [])
    assert asked == [("Qwen/Qwen3-30B-A3B-Later", "config.json", "v1")]
    room.check(cfg, ["train"], [])  # which can shard
    room.check(dataclasses.replace(cfg, model="mini/model", revision=""), [], [])  # a folder of this repository
    assert len(asked) == 1
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    room.check(cfg, [], [])  # `locate` says what is wrong


def test_what_holds_the_model_and_what_does_not(tmp_path: Path) -> None:
    cfg = RunConfig(model="Qwen/Qwen3-30B-A3B", dtype="bfloat16", method="sft,kto", out=str(tmp_path), label_eval=5)
    assert room.stages_that_hold(cfg, []) == ["sample", "eval", "report"]
    assert room.stages_that_hold(cfg, ["candidates", "train"]) == []
    own = dataclasses.replace(cfg, annotator="self")
    assert room.stages_that_hold(own, []) == ["sample", "annotate", "eval", "labels", "report"]
    assert room.stages_that_hold(dataclasses.replace(cfg, backend="openai", base_url="x"), []) == []
    config, _ = plan.shape_of(cfg.model)
    assert 61.06e9 < room.need(cfg, config) < 63e9  # 30.53 billion weights of two bytes, and a row's cache
    assert room.cards(room.need(cfg, config), 40 * 10**9) == 2 and room.cards(room.need(cfg, config), 80 * 10**9) == 1
    serve, _ = room.server_lines(cfg, [], 2)
    assert "--enable-lora" not in serve  # nothing is trained yet
    for method in ("sft", "kto"):
        (tmp_path / method).mkdir()
        (tmp_path / method / "adapter_config.json").touch()
    serve, _ = room.server_lines(cfg, [], 2)
    assert serve[-3:] == ["--lora-modules", f"sft={tmp_path}/sft", f"kto={tmp_path}/kto"] and "32" in serve


# ---------- sampling


def test_completions_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Alone, in small batches, all together: the same tokens; greedy ones are those of the pass without a cache."""
    peer("qwen3_moe", intermediate_size=64, shape=(4, 2, 16, 64)).save_pretrained(tmp_path)
    m = qwen.load(tmp_path).requires_grad_(False)
    prompts = [row.tolist() for row in tokens(3, 9, 5, 70, 1)] * 4
    seeds = list(range(len(prompts)))
    run = {"max_new": 12, "stop_ids": {3}}
    together = sample.generate(m, prompts, seeds, **run)
    assert sample.generate(m, prompts, seeds, batch_size=3, **run) == together
    assert [sample.generate(m, [p], [s], **run)[0] for p, s in zip(prompts[:5], seeds, strict=False)] == together[:5]
    for prompt, c in zip(prompts[:5], sample.generate(m, prompts[:5], seeds[:5], temperature=0.0, **run), strict=True):
        ids = torch.tensor([*prompt, *c.ids])
        best = m.logits(m(*packed([ids]))).argmax(-1)[len(prompt) - 1 : -1]
        assert torch.equal(best, ids[len(prompt) :])


# ---------- routes


def adapted(tmp_path: Path, size: float) -> qwen.Qwen3:
    peer("qwen3_moe").save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    generator = torch.Generator().manual_seed(2)
    for p in lora.add(m, r=4, alpha=8.0)[1::2]:
        p.data += size * torch.randn(p.shape, generator=generator)
    return m


def test_load_by_hand(tmp_path: Path) -> None:
    """Counted again with a loop over tokens; B = 0 changes nothing."""
    batch = data.pack([(row.tolist()[:3], row.tolist()[3:], torch.ones(len(row) - 3)) for row in tokens(20, 11)])
    still = moe.load_metrics(adapted(tmp_path, 0.0), [(batch, 2)], Alone())
    assert still["router/changed"] == still["router/changed_choices"] == 0 and still["router/tokens"] == 31
    assert still["router/share"] == still["router/share_reference"]
    m = adapted(tmp_path, 0.1)
    with torch.no_grad(), moe.recorded(m) as policy:
        m(batch.ids, batch.cu_seqlens)
    with torch.no_grad(), lora.disabled(m), moe.recorded(m) as reference:
        m(batch.ids, batch.cu_seqlens)
    sets = [[[set(row) for row in layer.tolist()] for layer in side] for side in (policy, reference)]
    moved = [[len(a - b) for a, b in zip(p, q, strict=True)] for p, q in zip(*sets, strict=True)]
    got = moe.load_metrics(m, [(batch, 2), (batch, 0)], Alone())
    assert got["router/changed"] == sum(map(any, zip(*moved, strict=True))) / 31 > 0.1
    assert got["router/changed_choices"] == sum(map(sum, moved)) / (31 * 2 * 2)
    for name, side in zip(("", "_reference"), sets, strict=True):
        shares = [[sum(e in chosen for chosen in layer) / 31 for e in range(6)] for layer in side]
        assert got[f"router/share{name}"] == [round(sum(x) / 2, 4) for x in zip(*shares, strict=True)]
        assert got[f"router/busiest{name}"] == pytest.approx(max(map(max, shares)) * 6 / 2)


class Alone:
    """Ranks of a world of one, without a process group."""

    device = torch.device("cpu")

    @staticmethod
    def sum(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_the_table_of_routes_takes_rows_of_one_class_and_refuses_none(tmp_path: Path, capsys) -> None:
    """Adapters of B = 0 move nothing: no token is sent elsewhere."""
    peer("qwen3_moe").save_pretrained(tmp_path / "base")
    m = qwen.load(tmp_path / "base")
    lora.add(m, 2, 4.0)
    lora.save(m, tmp_path / "adapter", "base")
    ids = tokens(4, 9)
    row = {"id": "q", "prompt": "", "completion": "abcdefghi", "label": True, "spans": [], "labels": [], "w": []}
    row |= {"prompt_ids": ids[0].tolist(), "completion_ids": ids[1].tolist()}
    write_jsonl(tmp_path / "train.jsonl", [row])
    given = [str(tmp_path / name) for name in ("base", "adapter", "train.jsonl")]
    assert routes.main(given) == 0
    told = capsys.readouterr().out
    (shown,) = [line for line in told.splitlines() if "chosen" in line]
    assert [cell.strip() for cell in shown.split("|")[1:5]] == ["1 chosen", "9", "0", "0"] and "rejected" not in told
    assert routes.main([*given, "--rows", "0"]) == 3
    assert "--rows is 0" in capsys.readouterr().err


@torch.no_grad()
def test_imposed_routes_are_used_and_their_weights_are_the_models_own(tmp_path: Path) -> None:
    m = adapted(tmp_path, 0.1)
    ids, cu_seqlens = packed(tokens(20, 11))
    with moe.recorded(m) as own:
        expected = m(ids, cu_seqlens)
    with moe.imposed(m, own):
        assert torch.equal(m(ids, cu_seqlens), expected)
    with moe.recorded(m) as reference, lora.disabled(m):
        m(ids, cu_seqlens)
    with moe.imposed(m, reference):
        other = m(ids, cu_seqlens)
    assert not torch.equal(other, expected)
    assert all(block.tap is None for block in moe.blocks(m)) and torch.equal(m(ids, cu_seqlens), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_before_training_the_policy_is_the_reference_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """The same routes and the same hidden states: the first log-ratio is 0 exactly, stacked weights or not."""
    peer("qwen3_moe").save_pretrained(tmp_path)
    m = qwen.load(tmp_path, dtype)
    lora.add(m, r=4, alpha=8.0)
    ids, cu_seqlens = packed(tokens(40, 17))
    for _ in range(2):
        with moe.recorded(m) as policy:
            hidden = m(ids, cu_seqlens)
        with moe.recorded(m) as reference, lora.disabled(m):
            assert torch.equal(m(ids, cu_seqlens), hidden)
        assert all(torch.equal(p, q) for p, q in zip(policy, reference, strict=True))
        m.stack()


# ---------- the whole pipeline

ROOT = Path(mralign.__file__).parent
DRAWS = 3


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile cannot link from a path with a space in it")
def test_compiled_layers_give_the_same_gradients(tmp_path: Path) -> None:
    """The experts' shares are in the data: compiled or not, their part is the same."""
    m = adapted(tmp_path, 0.1).double()
    ids, cu = packed(tokens(9, 21))

    def gradients() -> list[torch.Tensor]:
        m.zero_grad()
        m(ids, cu).pow(2).sum().backward()
        return [p.grad.clone() for p in m.parameters() if p.grad is not None]

    plain = gradients()
    m.compile_layers()
    compiled = gradients()
    assert len(plain) == len(compiled) > 0
    for x, y in zip(plain, compiled, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * float(x.abs().max()))


def random_miniature(folder: Path) -> Path:
    """A random mixture with the miniature's tokenizer."""
    folder.mkdir()
    for file in (ROOT / "mini" / "model").glob("*.json"):
        shutil.copy(file, folder)
    sizes = dict(hidden_size=64, moe=MixtureConfig(4, 2, 32, True), model_type="qwen3_moe", num_hidden_layers=2)
    torch.manual_seed(0)
    net = qwen.Qwen3(ModelConfig(vocab_size=build.VOCABULARY, eos_token_id=2, **build.SHAPE | sizes))
    for p in net.requires_grad_(False).parameters():
        p.mul_(3.0 if p.ndim > 1 else 1.0)
    qwen.save(net, folder)
    return folder


def drawn_by_the_world(folder: Path, questions: list[dict]) -> list[dict]:
    """Samples as a trained miniature may draw them: thoughts right and answers without them wrong, or the reverse."""
    tokenizer, world, rng = load_tokenizer(folder), World(0), random.Random(3)
    facts = {fact.id: fact for fact in world.facts}
    rows = []
    for q in questions:
        fact = facts[q["id"].rsplit("#", 1)[0]]
        trace = world.think_on(rng, fact, world.question(rng, fact)[0])
        right = trace.answer == fact.object
        off = wrap(fact.distractor if right else fact.object)
        for mode, text in (("on", trace.completion), ("off", off)):
            prompt = build.prompt(q["question"], mode == "on")
            ids = {"prompt_ids": encode(tokenizer, prompt), "ids": encode(tokenizer, text + build.END_OF_TURN)}
            row = {"id": q["id"], "mode": mode, "question": q["question"], "answers": q["answers"], "dataset": "mini"}
            row |= {"prompt": prompt, "text": text, "finish": "stop", "model": "world", "engine": "world"} | ids
            rows += [row | {"draw": k} for k in range(DRAWS)]
    return rows


@pytest.mark.long
def test_a_random_mixture_goes_through_the_whole_pipeline(tmp_path: Path) -> None:
    """Two ranks with --shard, killed by SIGKILL and resumed to the same bytes; evaluated, merged, served, checked."""
    model, out = random_miniature(tmp_path / "model"), tmp_path / "run"
    questions = read_jsonl(ROOT / "mini/questions/train.jsonl")[:24]
    write_jsonl(tmp_path / "train.jsonl", questions)
    write_jsonl(tmp_path / "few.jsonl", questions[:2])
    write_jsonl(tmp_path / "test.jsonl", read_jsonl(ROOT / "mini/questions/test.jsonl")[:4])
    common = ["--config", "configs/mini.json", "--model", model, "--method", "mralign", "--draws", DRAWS]
    common += ["--eval-sets", f"test={tmp_path / 'test.jsonl'}", "--max-new", 8, "--draw-max-new", 8, "--shard"]
    common += ["--lr", 2e-2, "--epochs", 1, "--batch-size", 4, "--micro-batch", 2, "--save-every", 1]

    def flags(folder: Path, questions: str, *stages: str) -> list[str]:
        own = ["--questions", tmp_path / questions, "--out", folder, "--resume"]
        return [str(x) for x in (*common, *own, *stages)]

    def start(*given: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "mralign.py"]
        log = open(tmp_path / "log", "a")  # noqa: SIM115
        return subprocess.Popen([*command, *given], cwd=ROOT, stdout=log, stderr=log)

    def alone(*given: str) -> None:
        with contextlib.chdir(ROOT):
            assert mralign.main(list(given)) == 0

    assert start(*flags(out, "few.jsonl", "sample")).wait() == 0, (tmp_path / "log").read_text()
    assert len(read_jsonl(out / "samples.jsonl")) == 2 * 2 * DRAWS
    write_jsonl(out / "samples.jsonl", drawn_by_the_world(model, questions))
    (out / "done/sample.json").unlink()  # samples of one's own have no receipt
    alone(*flags(out, "train.jsonl", "candidates", "annotate", "fit"))
    shutil.copytree(out, tmp_path / "killed")
    assert start(*flags(out, "train.jsonl", "train")).wait() == 0, (tmp_path / "log").read_text()
    killed = start(*flags(tmp_path / "killed", "train.jsonl", "train"))
    while not list((tmp_path / "killed").glob("mralign/checkpoint-000003")):
        assert killed.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for pid in (killed.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/mralign/adapter_model.safetensors").exists()
    assert start(*flags(tmp_path / "killed", "train.jsonl", "train")).wait() == 0, (tmp_path / "log").read_text()
    assert "continuing after step" in (tmp_path / "log").read_text()
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "killed/mralign" / name).read_bytes() == (out / "mralign" / name).read_bytes(), name
    first, *_, last = read_jsonl(out / "mralign/metrics.jsonl")
    assert first["router/changed"] == 0 and last["router/changed"] > 0 and len(last["router/share"]) == 4
    assert sum(last["router/share"]) == pytest.approx(2, abs=1e-3)  # two experts a token
    config = json.loads((out / "mralign/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(lora.ATTENTION)
    alone(*flags(out, "train.jsonl", "eval", "scores", "analysis", "report"))
    assert (out / "report.html").exists() and json.loads((out / "results.json").read_text())["scores"]["test"]

    adapter, merged = out / "mralign", tmp_path / "merged"
    assert export.main(["merge", str(adapter), str(merged)]) == 0
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    ours = qwen.load(model)
    lora.load(ours, adapter)
    ids = torch.randint(build.VOCABULARY, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        assert (ours.logits(ours(ids[0], torch.tensor([0, 50]))) - expected).abs().max() <= 2e-5
        assert (AutoModelForCausalLM.from_pretrained(merged)(ids).logits[0] - expected).abs().max() <= 1e-4
    handler = type("Bound", (Handler,), {"seen": [], "said": staticmethod(lambda ids: truth(theirs, ids))})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        assert export.main(["serve-check", str(adapter), f"mralign@{address}"]) == 0
    finally:
        server.shutdown()
        server.server_close()
