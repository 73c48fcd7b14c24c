"""lora.py against peft: the same logits from the same files, in both directions, and exact switching."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import peers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import lora
import model as qwen
from common.errors import InputError

CONFIG = Qwen3Config(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    eos_token_id=3,
    initializer_range=0.2,
)
IDS = torch.randint(97, (1, 13), generator=torch.Generator().manual_seed(7))
CU_SEQLENS = torch.tensor([0, 13])


def peer(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(CONFIG).to(dtype).eval()


def ours(tmp_path: Path) -> qwen.Qwen3:
    peer().save_pretrained(tmp_path / "base")
    return qwen.load(tmp_path / "base")


def logits(m: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(m, qwen.Qwen3):
            return m.logits(m(IDS[0], CU_SEQLENS))
        return m(IDS).logits[0]


def fill(parameters: list[nn.Parameter]) -> None:
    """Adapters as training might leave them: no zero left."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def test_peft_computes_the_same_from_our_files(tmp_path: Path) -> None:
    """On one and the same base the logits are PEFT's bit for bit."""
    m = peer()
    fill(lora.add(m, r=4, alpha=12, seed=1))
    lora.save(m, tmp_path, "some/base")
    theirs = peft.PeftModel.from_pretrained(peer(), tmp_path).eval()
    got, expected = logits(m), logits(theirs)
    assert torch.equal(got, expected)
    assert (expected - logits(peer())).abs().max() > 0.1  # the adapter is no ornament


SHAPES = {  # tokens, in, out of each layer that reads the input
    "q k v": (70, 48, (64, 32, 32)),
    "gate up": (33, 48, (56, 56)),
    "o": (20, 64, (48,)),
    "few tokens": (3, 160, (96, 80)),
    "long": (400, 96, (24,)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_no_further_from_fp64_than_peft_under_autocast(shape: str, dtype: torch.dtype) -> None:
    """Outputs and the gradients of x, A and B; the same rounded weights, input and output gradient for all three."""
    N, inner, outs = SHAPES[shape]
    generator = torch.Generator().manual_seed(5)
    m = nn.Module()
    names = [f"part{i}_proj" for i in range(len(outs))]
    for name, out in zip(names, outs, strict=True):
        m.add_module(name, nn.Linear(inner, out, dtype=dtype))
        m.get_submodule(name).weight.data = torch.randn(out, inner, generator=generator).to(dtype) * inner**-0.5
    theirs = peft.get_peft_model(copy.deepcopy(m), peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    masters = lora.add(m, 4, 8, targets=tuple(names))
    fill(masters)
    exact = copy.deepcopy(m).double()
    peers_masters = []
    for name in names:
        layer, of_peft = m.get_submodule(name), theirs.base_model.model.get_submodule(name)
        for side in "AB":
            p = getattr(of_peft, f"lora_{side}")["default"].weight
            p.data = getattr(layer, f"lora_{side}").detach().float().clone()
            peers_masters.append(p)
    x = torch.randn(N, inner, generator=generator).to(dtype)
    g = torch.randn(N, sum(outs), generator=generator).to(dtype)

    def answers(run, x, masters) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        y = run(x)
        gradients = torch.autograd.grad(y, [x, *masters], g.to(y.dtype))
        return [y.detach().double(), *(gradient.double() for gradient in gradients)]

    def apart(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.get_submodule(name)(x) for name in names], 1)

    def in_peft(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return apart(theirs.base_model.model, x)

    layers = [m.get_submodule(name) for name in names]
    whole = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    exact_masters = [p for p in exact.parameters() if p.requires_grad]
    expected = answers(lambda x: apart(exact, x), x.double(), exact_masters)
    bound = answers(in_peft, x, peers_masters)
    for got in (
        answers(lambda x: lora.joint(x, layers, *whole), x, masters),
        answers(lambda x: apart(m, x), x, masters),
    ):
        errors = [
            (float((ours - true).norm() / true.norm()), float((peft_ - true).norm() / true.norm()))
            for ours, peft_, true in zip(got, bound, expected, strict=True)
        ]
        assert all(ours <= 1.05 * peft_ for ours, peft_ in errors), errors
    assert all(p.dtype == torch.float32 for p in masters)


def test_input_is_kept_once_and_never_in_fp32() -> None:
    """Three layers, one input: the backward pass holds x, the three A x and weights, all bf16."""
    m = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        m.add_module(name, nn.Linear(48, 32, bias=False, dtype=torch.bfloat16))
    lora.add(m, 4, 8, targets=("q_proj", "k_proj", "v_proj"))
    layers = [m.q_proj, m.k_proj, m.v_proj]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora.joint(torch.randn(100, 48).bfloat16(), layers, torch.cat([layer.weight for layer in layers]), None)
    of_tokens = [tuple(t.shape) for t in kept if t.shape and t.shape[0] == 100]
    assert sorted(of_tokens) == [(100, 12), (100, 48)] and all(t.dtype == torch.bfloat16 for t in kept if len(t) == 100)


def test_rounded_once_gives_the_same_bits_and_sees_what_changed_before_it(monkeypatch) -> None:
    """A step's passes share the stacked adapters; the next step makes them again from what the optimiser left."""
    m = nn.Module()
    for name, out in (("q_proj", 32), ("k_proj", 16)):
        m.add_module(name, nn.Linear(48, out, bias=False, dtype=torch.bfloat16))
    masters = lora.add(m, 4, 8, targets=("q_proj", "k_proj"))
    layers, x = [m.q_proj, m.k_proj], torch.randn(9, 48).bfloat16()
    whole = torch.cat([layer.weight for layer in layers]), None
    made = []
    monkeypatch.setattr(lora, "stacked", lambda *of, make=lora.stacked: made.append(1) or make(*of))

    def answers() -> list[torch.Tensor]:
        y = lora.joint(x, layers, *whole)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), masters)]

    for _ in range(2):
        fill(masters)
        plain = [*answers(), *answers()]
        made.clear()
        with lora.rounded(m):
            shared = [*answers(), *answers()]
        assert len(made) == 1
        assert all(torch.equal(a, b) for a, b in zip(plain, shared, strict=True))
        for p in masters:
            p.data.mul_(2)
    assert not torch.equal(answers()[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_new_adapters_and_switched_off_ones_are_the_base_bit_for_bit_when_stacked(dtype: torch.dtype) -> None:
    """B = 0 adds exact zeros to the base product: the first log-ratio of training is exactly 0."""
    torch.manual_seed(1)
    layers = [nn.Linear(96, n, dtype=dtype) for n in (64, 32, 32)]
    whole = torch.cat([m.weight.detach() for m in layers]), torch.cat([m.bias.detach() for m in layers])
    x = torch.randn(50, 96).to(dtype)
    base = lora.joint(x, layers, *whole)
    m = nn.ModuleDict({f"{i}_proj": layer for i, layer in enumerate(layers)})
    parameters = lora.add(m, 4, 8, targets=tuple(m))
    assert torch.equal(lora.joint(x, list(m.values()), *whole), base)
    fill(parameters)
    assert not torch.equal(lora.joint(x, list(m.values()), *whole), base)
    with lora.disabled(m):
        assert torch.equal(lora.joint(x, list(m.values()), *whole), base)


@pytest.mark.parametrize("kind", peers.KINDS)
def test_our_model_with_an_adapter_equals_theirs(tmp_path: Path, kind: str) -> None:
    """transformers with PEFT has our logits from our adapter, and transformers alone from our merged model."""
    peers.peer(kind, initializer_range=0.15).save_pretrained(tmp_path / "base")
    m = qwen.load(tmp_path / "base")
    plain = logits(m)
    fill(lora.add(m, r=4, alpha=8))
    lora.save(m, tmp_path / "adapter", str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    before = logits(m)
    assert (before - logits(theirs)).abs().max() <= 1e-5 and (before - plain).abs().max() > 0.1
    back = qwen.load(tmp_path / "base")
    lora.load(back, tmp_path / "adapter")
    assert torch.equal(logits(back), before)
    lora.merge(m)
    qwen.save(m, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - before).abs().max() <= 1e-5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapter_saved_by_peft_loads_here(tmp_path: Path, stored: torch.dtype) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(peer(), config).eval()
    fill([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    tensors = {name: t.to(stored) for name, t in load_file(tmp_path / lora.WEIGHTS).items()}
    save_file(tensors, tmp_path / lora.WEIGHTS)
    theirs = peft.PeftModel.from_pretrained(peer(), tmp_path).eval()
    m = peer()
    parameters = lora.load(m, tmp_path)
    assert len(parameters) == 2 * 2 * 2 and {p.dtype for p in parameters} == {torch.float32}
    assert torch.equal(logits(m), logits(theirs))


def test_saved_config_holds_what_readers_need(tmp_path: Path) -> None:
    """vLLM requires r, lora_alpha, an explicit target list and bias none; a missing key makes PEFT guess silently."""
    m = peer()
    lora.add(m, r=4, alpha=8)
    lora.save(m, tmp_path, "some/base", "0123abcd")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["revision"] == "0123abcd"
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == sorted(lora.TARGETS)
    assert config["bias"] == "none" and config["modules_to_save"] is None and config["use_dora"] is False
    assert config["base_model_name_or_path"] == "some/base"
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    assert len(names) == 2 * 7 * 2 and all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)


def test_new_adapter_changes_nothing_and_starts_as_pefts(tmp_path: Path) -> None:
    """B = 0 gives the base logits bit for bit; A is uniform in +-1/sqrt(in), as kaiming_uniform(a=sqrt(5)) is."""
    base = logits(ours(tmp_path))
    m = ours(tmp_path)
    parameters = lora.add(m, r=32, alpha=64)
    assert torch.equal(logits(m), base)
    for name, p in lora.state(m).items():
        if "lora_B" in name:
            assert (p == 0).all()
        else:
            bound = 1 / math.sqrt(p.shape[1])
            assert p.abs().max() <= bound and abs(p.std().item() - bound / math.sqrt(3)) < 0.05 * bound
    assert [id(p) for p in parameters] == [id(p) for p in lora.state(m).values()]
    trained = {name for name, p in m.named_parameters() if p.requires_grad}
    assert len(trained) == len(parameters) == 28 and all("lora_" in name for name in trained)


def test_seed_decides_the_start() -> None:
    starts = []
    for seed in (5, 5, 6):
        m = peer()
        starts.append(torch.cat([p.flatten() for p in lora.add(m, 4, 8, seed=seed)]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_disabled_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    m, base = peer(dtype), logits(peer(dtype))
    fill(lora.add(m, 4, 8))
    on = logits(m)
    assert not torch.equal(on, base)
    with lora.disabled(m):
        assert torch.equal(logits(m), base)
        with lora.disabled(m):
            pass
        assert torch.equal(logits(m), base)  # leaving the inner block does not switch them on
    assert torch.equal(logits(m), on)
    with pytest.raises(KeyError), lora.disabled(m):
        raise KeyError
    assert torch.equal(logits(m), on)


def test_only_adapters_get_gradients_and_none_when_disabled(tmp_path: Path) -> None:
    m = ours(tmp_path)
    parameters = lora.add(m, 4, 8)
    fill(parameters)
    m(IDS[0], CU_SEQLENS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    assert all(p.grad is None for name, p in m.named_parameters() if "lora_" not in name)
    with lora.disabled(m):
        assert not m(IDS[0], CU_SEQLENS).requires_grad


def test_merged_equals_unmerged(tmp_path: Path) -> None:
    """Merging leaves the plain model with W + (alpha / r) B A, which saves as a checkpoint transformers reads."""
    m = ours(tmp_path)
    fill(lora.add(m, r=4, alpha=6))
    before = logits(m)
    layer = m.model.layers[1].mlp.gate_proj
    expected = layer.weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
    lora.merge(m)
    assert (m.model.layers[1].mlp.gate_proj.weight - expected).abs().max() <= 1e-6
    assert (logits(m) - before).abs().max() <= 1e-5
    assert not any("lora" in name for name, _ in m.named_parameters())
    qwen.save(m, tmp_path / "merged")
    assert (logits(Qwen3ForCausalLM.from_pretrained(tmp_path / "merged")) - before).abs().max() <= 1e-5


def test_merge_rounds_once_in_bf16() -> None:
    linear = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    m = nn.Module()
    m.q_proj = linear
    weight = linear.weight.detach().clone()
    A, B = lora.add(m, 2, 4, targets=("q_proj",))
    fill([A, B])
    expected = (weight.double() + 2 * B.double() @ A.double()).to(torch.bfloat16)
    lora.merge(m)
    assert torch.equal(m.q_proj.weight, expected)


def test_bias_of_the_base_layer_stays() -> None:
    m = nn.Sequential()
    m.add_module("q_proj", nn.Linear(6, 5))
    x = torch.randn(3, 6)
    before = m(x)
    fill(lora.add(m, 2, 2, targets=("q_proj",)))
    assert (m(x) - before).abs().max() > 1e-3
    on = m(x)
    lora.merge(m)
    assert type(m.q_proj) is nn.Linear and (m(x) - on).abs().max() <= 1e-6


# -- files that do not fit -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    m = peer()
    lora.add(m, r=4, alpha=8)
    lora.save(m, tmp_path, "some/base")
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("peft_type", "IA3", "'LORA'"),
        ("r", 0, "positive integer"),
        ("r", ..., "missing"),
        ("lora_alpha", ..., "missing"),
        ("lora_alpha", "8", "positive number"),
        ("target_modules", ..., "missing"),
        ("target_modules", "all-linear", "list of module names"),
        ("target_modules", ["query"], "names no linear layer"),
        ("bias", "all", "'none'"),
        ("use_rslora", True, "not supported"),
        ("use_dora", True, "not supported"),
        ("modules_to_save", ["lm_head"], "not supported"),
        ("rank_pattern", {"q_proj": 8}, "not supported"),
        ("init_lora_weights", "pissa", "gaussian"),
        ("init_lora_weights", "olora", "gaussian"),
        ("layers_to_transform", 0, "not supported"),
        ("a_field_of_the_future", 1, "not supported"),
    ],
)
def test_refused_config(folder: Path, field: str, value: object, word: str) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(InputError) as error:
        lora.load(peer(), folder)
    message = str(error.value)
    assert field in message and word in message and "\n" not in message, message


# What PEFT's config may hold besides its defaults: field -> a value with which it saves an adapter, and what we do.
PEFT_OPTIONS = {
    "task_type": ("CAUSAL_LM", "honoured"),
    "lora_dropout": (0.3, "honoured"),
    "target_modules": (["layers.0.self_attn.q_proj", "down_proj"], "honoured"),
    "r": (5, "honoured"),
    "lora_alpha": (3, "honoured"),
    "inference_mode": (True, "honoured"),
    "megatron_core": ("another.core", "honoured"),
    "qalora_group_size": (8, "honoured"),
    "ensure_weight_tying": (True, "honoured"),
    "eva_config": ({"rho": 1.0}, "honoured"),
    "init_lora_weights": ("orthogonal", "honoured"),
    "bias": ("lora_only", "refused"),
    "exclude_modules": (["layers.1.self_attn.q_proj"], "refused"),
    "use_rslora": (True, "refused"),
    "modules_to_save": (["lm_head"], "refused"),
    "layers_to_transform": ([0], "refused"),
    "layers_pattern": (["layers"], "refused"),
    "rank_pattern": ({"q_proj": 2}, "refused"),
    "alpha_pattern": ({"q_proj": 32}, "refused"),
    "trainable_token_indices": ([1, 2], "refused"),
    "use_dora": (True, "refused"),
    "alora_invocation_tokens": ([1], "refused"),
    "use_qalora": (True, "refused"),
    "layer_replication": ([[0, 2], [1, 2]], "refused"),
    "lora_bias": (True, "refused"),
    "target_parameters": (["mlp.weight"], "refused"),
    "fan_in_fan_out": (True, "refused"),
    "auto_mapping": ({"base_model_class": "X"}, "refused"),
    "loftq_config": ({"loftq_bits": 4}, "refused"),
    "corda_config": ({"rho": 1}, "refused"),
    "lora_ga_config": ({"scale": "stable"}, "refused"),
    "velora_config": ({"num_groups": 2}, "refused"),
    "monteclora_config": ({"num_samples": 2}, "refused"),
    "kasa_config": ({"x": 1}, "refused"),
    "arrow_config": ({"x": 1}, "refused"),
    "use_bdlora": ({"nblocks": 2}, "refused"),
    "megatron_config": ({"x": 1}, "refused"),
}


def test_every_field_of_pefts_config_is_in_the_table() -> None:
    named = {"peft_type", "base_model_name_or_path", "revision", "peft_version"}  # written in every file
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"} == named | set(PEFT_OPTIONS)


@pytest.mark.parametrize("field", [f for f, (_, what) in PEFT_OPTIONS.items() if what == "honoured"])
def test_an_option_that_is_honoured_gives_pefts_logits(tmp_path: Path, field: str) -> None:
    """Whatever PEFT wrote into its file: the two models agree bit for bit, and the adapter does something."""
    value = PEFT_OPTIONS[field][0]
    made = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(peer(), peft.LoraConfig(**made | ({} if field == "eva_config" else {field: value})))
    fill([p for name, p in theirs.named_parameters() if "lora_" in name])
    theirs.save_pretrained(tmp_path)
    if field == "eva_config":  # it needs data to be made with; what it leaves in the file is this
        edited(tmp_path, {field: value, "init_lora_weights": "eva"})
    elif field == "inference_mode":
        assert json.loads((tmp_path / lora.CONFIG).read_text())[field] is True
    m = peer()
    lora.load(m, tmp_path)
    theirs = peft.PeftModel.from_pretrained(peer(), tmp_path).eval()
    assert torch.equal(logits(m), logits(theirs))
    assert (logits(m) - logits(peer())).abs().max() > 1e-3


@pytest.mark.parametrize("field", [f for f, (_, what) in PEFT_OPTIONS.items() if what == "refused"])
def test_an_option_that_is_not_computed_is_refused(folder: Path, field: str) -> None:
    edited(folder, {field: PEFT_OPTIONS[field][0]})
    with pytest.raises(InputError, match=f"adapter_config.json: {field} is "):
        lora.load(peer(), folder)


def edited(folder: Path, changes: dict) -> None:
    path = folder / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_with_all_of_pefts_defaults_written_out_loads(folder: Path) -> None:
    defaults = peft.LoraConfig().to_dict()
    keep = {"peft_type", "r", "lora_alpha", "target_modules", "task_type", "base_model_name_or_path"}
    edited(folder, {k: v for k, v in defaults.items() if k not in keep})
    assert lora.load(peer(), folder)
    (folder / lora.CONFIG).write_text("[]")
    with pytest.raises(InputError, match="must hold one JSON object"):
        lora.load(peer(), folder)


def test_every_wrong_tensor_is_named(folder: Path) -> None:
    prefix = "base_model.model.model.layers"
    tensors = load_file(folder / lora.WEIGHTS)
    del tensors[f"{prefix}.0.mlp.up_proj.lora_A.weight"]
    tensors[f"{prefix}.1.mlp.up_proj.lora_A.weight"] = torch.zeros(8, 48)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 48)
    save_file(tensors, folder / lora.WEIGHTS)
    with pytest.raises(InputError) as error:
        lora.load(peer(), folder)
    message = str(error.value)
    assert f"{prefix}.0.mlp.up_proj.lora_A.weight is missing" in message
    assert f"{prefix}.1.mlp.up_proj.lora_A.weight is of shape (8, 48), not (4, 48)" in message
    assert "base_model.model.lm_head.lora_A.weight is extra" in message and "\n" not in message


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapter_config.json: no such file"):
        lora.load(peer(), tmp_path)


def test_a_rank_beyond_every_layer_is_refused_before_anything_is_made():
    model = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(InputError, match="r is 9 and the largest layer has 8 rows or columns"):
        lora.add(model, 9, 1.0, ("0",))
    with pytest.raises(InputError, match="r is 1,000,000,000,000"):
        lora.add(model, 10**12, 1.0, ("0",))  # 16 TB
    assert len(lora.add(model, 8, 1.0, ("0",))) == 2
