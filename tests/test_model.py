"""model.py against transformers, architecture by architecture, and what it says about files that do not fit."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from peers import KINDS, LLAMA3, SHAPES, VOCAB, peer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora
import model as qwen
from common import weights
from common.errors import InputError
from common.model_config import ModelConfig, RopeScaling

# What is compared: every shape for one architecture, one shape for the others.
CASES = [("qwen3", shape) for shape in SHAPES.values()] + [("qwen2", SHAPES["ratio 2"]), ("llama", SHAPES["ratio 4"])]
CASES += [("qwen3_moe", SHAPES["ratio 2"])]


def tokens(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def packed(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat(rows), torch.tensor([0] + [len(row) for row in rows]).cumsum(0)


def decode(m: qwen.Qwen3, ids: torch.Tensor, cache: qwen.KVCache) -> torch.Tensor:
    """One token more in each of the first slots."""
    B = len(ids)
    hidden = m.decode(ids, cache.lens[:B].clone(), cache, cache.groups(B))
    cache.lens[:B] += 1
    return hidden


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An untied checkpoint as transformers writes it, without its weights in memory."""
    peer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("kind", "shape"), CASES)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path: Path, kind: str, tied: bool, shape: tuple[int, ...]) -> None:
    """Packed, prefilled and decoded with a cache: each row as transformers computes it alone, uncached."""
    hf = peer(kind, tied, shape)
    hf.save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    rows = tokens(5, 1, 70, 9)
    ids, cu_seqlens = packed(rows)
    expected = torch.cat([hf(row[None]).logits[0] for row in rows])
    assert (m.logits(m(ids, cu_seqlens)) - expected).abs().max() <= 1e-5

    cache = qwen.KVCache(m.config, 6, 80, torch.float32, "cpu")
    assert 6 * cache.bytes(m.config, 80, torch.float32, "cpu") == sum(layer.nbytes for layer in cache.k + cache.v)
    hidden = m(ids, cu_seqlens, cache, torch.tensor([2, 0, 1, 3]))
    assert (m.logits(hidden) - expected).abs().max() <= 1e-5
    rows = [rows[1], rows[2], rows[0], rows[3]]  # by slot
    for new in torch.randint(VOCAB, (4, 4), generator=torch.Generator().manual_seed(2)):
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, new, strict=True)]
        if len(rows[0]) % 2:  # the weights stacked or one by one: both are the model
            with m.stacked():
                got = m.logits(decode(m, new, cache))
        else:
            got = m.logits(decode(m, new, cache))
        expected = torch.stack([hf(row[None]).logits[0, -1] for row in rows])
        assert (got - expected).abs().max() <= 1e-5
    assert cache.lens.tolist() == [5, 74, 9, 13, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bf16_is_as_exact_as_transformers_in_bf16(tmp_path: Path, kind: str) -> None:
    """Packed, prefilled and decoded: at most twice the error that transformers' own eager bf16 has against fp32."""
    hf = peer(kind)
    hf.save_pretrained(tmp_path)
    rough = type(hf).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    m = qwen.load(tmp_path, torch.bfloat16)
    rows = tokens(5, 70, 9)
    ids, cu_seqlens = packed(rows)
    exact, theirs = (torch.cat([x(row[None]).logits[0].float() for row in rows]) for x in (hf, rough))
    allowed = 2 * (theirs - exact).abs()
    cache = qwen.KVCache(m.config, 3, 80, torch.bfloat16, "cpu")
    for hidden in (m(ids, cu_seqlens), m(ids, cu_seqlens, cache, torch.arange(3))):
        error = (m.logits(hidden).float() - exact).abs()
        assert error.max() <= allowed.max() and error.mean() <= allowed.mean()
    new = torch.tensor([7, 8, 9])
    with m.stacked():
        got = m.logits(decode(m, new, cache)).float()
    rows = [torch.cat((row, token[None])) for row, token in zip(rows, new, strict=True)]
    exact, theirs = (torch.stack([x(row[None]).logits[0, -1].float() for row in rows]) for x in (hf, rough))
    assert (got - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_llama3_frequencies_by_hand() -> None:
    """8 positions, low 1, high 4: 2 pi turns once a position; 0.5 x 2 pi / 8 is below low; 2.5 x is the middle."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
    for turns, slowed in ((0.5, 1 / 8), (1.0, 1 / 8), (2.5, (1 + 1 / 8) / 2), (4.0, 1.0), (8.0, 1.0)):
        frequency = turns * 2 * math.pi / 8
        # Heads of size 4: the second pair turns theta^(-1/2) a position.
        config = ModelConfig(9, 8, 8, 1, 2, 1, 4, 1e-6, frequency**-2, True, 64, 1, rope_scaling=scaling)
        got = qwen.frequencies(config, torch.device("cpu"))[1]
        assert got.item() == pytest.approx(frequency * slowed, rel=1e-6)


@torch.no_grad()
def test_decoding_in_groups_of_different_width(tmp_path: Path) -> None:
    """More rows than one group, lengths over several cache blocks: the full forward, row by row; bits do not move."""
    # Whole vectors of 32 in every layer: the CPU rounds silu otherwise in what is left over at the end of a tensor.
    peer(intermediate_size=64).save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    group = qwen.GROUP["cpu"]
    B = group + 18
    lengths = [200 - 3 * b for b in range(group)] + [3 + b for b in range(18)]
    rows = tokens(*lengths)
    cache = qwen.KVCache(m.config, B, 256, torch.float32, "cpu")
    ids, cu_seqlens = packed(rows)
    m(ids, cu_seqlens, cache, torch.arange(B))
    assert cache.groups(B) == [(group, 256), (18, 64)]
    assert cache.groups(3) == [(3, 256)]
    (new,) = tokens(B, seed=5)
    hidden = decode(m, new, cache)
    assert hidden.shape == (B, m.config.hidden_size)
    alone = [m(*packed([torch.cat((row, t[None]))]))[-1] for row, t in zip(rows, new, strict=True)]
    assert (hidden - torch.stack(alone)).abs().max() <= 1e-5

    # The same rows in other slots, so in groups of another width: the same bits.
    slots = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    moved = qwen.KVCache(m.config, B, 256, torch.float32, "cpu")
    m(ids, cu_seqlens, moved, slots)
    again = decode(m, new[slots.argsort()], moved)
    assert torch.equal(again[slots], hidden)


@torch.no_grad()
def test_a_row_sees_only_itself_and_its_past(folder: Path) -> None:
    m = qwen.load(folder)
    first, second = tokens(8, 6)
    before = m(*packed([first, second]))
    changed = second.clone()
    changed[3] = (changed[3] + 1) % VOCAB
    after = m(*packed([first, changed]))
    same = (before == after).all(dim=-1)
    assert same.tolist() == [True] * 11 + [False] * 3


@torch.no_grad()
def test_prefill_leaves_other_slots_alone(folder: Path) -> None:
    """A prompt moves into a free slot while others decode; the copied slot continues like its source."""
    m = qwen.load(folder)
    a, b = tokens(7, 5)
    cache = qwen.KVCache(m.config, 3, 16, torch.float32, "cpu")
    m(*packed([a]), cache, torch.tensor([0]))
    kept = [layer[0].clone() for layer in cache.k]
    m(*packed([b]), cache, torch.tensor([2]))
    assert all(torch.equal(layer[0], before) for layer, before in zip(cache.k, kept, strict=True))
    assert cache.lens.tolist() == [7, 0, 5]
    cache.copy([2], [1])
    out = decode(m, torch.tensor([9, 9, 9]), cache)
    assert torch.equal(out[1], out[2]) and cache.lens.tolist() == [8, 6, 6]
    cache.clear([1])
    with pytest.raises(AssertionError, match="must be empty"):
        m(*packed([a]), cache, torch.tensor([0]))


@torch.no_grad()
def test_a_cache_of_another_shape_goes_on_as_before(folder: Path) -> None:
    """Longer, with more slots, shorter again with fewer: every step as from the full forward pass, the same bits."""
    m = qwen.load(folder)
    rows = tokens(60, 7, 33)
    cache, still = (qwen.KVCache(m.config, 3, size, torch.float32, "cpu") for size in (64, 256))
    for each in (cache, still):
        m(*packed(rows), each, torch.arange(3))
    for step, shape in enumerate([(3, 64), (3, 256), (5, 128), (3, 65), (4, 65)]):
        cache.reshape(*shape, kept=3)
        assert (cache.slots, cache.length) == (shape[0], -(-shape[1] // cache.block) * cache.block)
        assert cache.lens.tolist() == [60 + step, 7 + step, 33 + step] + [0] * (shape[0] - 3)
        (new,) = tokens(3, seed=step)
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, new, strict=True)]
        hidden = decode(m, new, cache)
        assert torch.equal(hidden, decode(m, new, still))
        alone = torch.stack([m(*packed([row]))[-1] for row in rows])
        assert (hidden - alone).abs().max() <= 1e-5
    with pytest.raises(AssertionError):
        cache.reshape(3, 64, kept=3)  # the longest row has more


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_weights_are_the_parameters(tmp_path: Path, kind: str) -> None:
    """Outside as before and still trainable; inside each product is one; a layer with an adapter keeps its own."""
    peer(kind).save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    ids, cu_seqlens = packed(tokens(6, 3))
    expected = m(ids, cu_seqlens).detach()
    lora.add(m, r=2, alpha=4.0, targets=("q_proj",))
    with torch.inference_mode(), m.stacked():
        attn, mlp = m.model.layers[1].self_attn, m.model.layers[1].mlp
        assert attn.stacked is None and torch.equal(mlp.stacked[0][: len(mlp.gate_proj.weight)], mlp.gate_proj.weight)
        assert mlp.stacked[0].data_ptr() == mlp.gate_proj.weight.data_ptr()  # no copy is kept
        assert (m(ids, cu_seqlens) - expected).abs().max() <= 1e-5
    place = mlp.gate_proj.weight.data_ptr()
    with m.stacked():  # they still lie so: nothing is copied
        assert mlp.stacked[0].data_ptr() == place
        assert torch.equal(mlp.stacked[0], torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
        mlp.up_proj.weight.data = mlp.up_proj.weight.data.clone()
    with m.stacked():  # and if one does not, it is
        assert torch.equal(mlp.stacked[0], torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
    lora.merge(m)
    m.requires_grad_(True)
    m(ids, cu_seqlens).sum().backward()
    for name, tensor in m.named_parameters():
        assert torch.equal(tensor, before[name]) and (tensor.grad is None) == (name == "lm_head.weight")
    qwen.save(m, tmp_path / "again")
    assert torch.equal(qwen.load(tmp_path / "again")(ids, cu_seqlens), expected)


def test_bf16_policy_is_its_reference_bit_for_bit_before_training_and_the_same_stacked(tmp_path: Path) -> None:
    """B = 0: adapters on and off give the same bits. Trained: gradients as from separate products."""
    peer("qwen3").save_pretrained(tmp_path)
    ids, cu_seqlens = packed(tokens(40, 17))
    m = qwen.load(tmp_path, torch.bfloat16)
    parameters = lora.add(m, r=4, alpha=8.0)
    m.stack()
    assert all(layer.self_attn.stacked and layer.mlp.stacked for layer in m.model.layers)
    with lora.disabled(m):
        reference = m(ids, cu_seqlens)
    assert torch.equal(m(ids, cu_seqlens), reference)
    generator = torch.Generator().manual_seed(2)
    for p in parameters:
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    gradients = []
    for stacked in (True, False):
        if not stacked:
            for layer in m.model.layers:
                layer.self_attn.stacked = layer.mlp.stacked = None
        gradients.append(torch.autograd.grad(m(ids, cu_seqlens).float().square().sum(), parameters))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_transformers_whatever_is_recomputed(tmp_path: Path, kind: str) -> None:
    hf = peer(kind, tied=True)
    hf.save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    rows = tokens(6, 11)
    ids, cu_seqlens = packed(rows)
    gradients = []
    for m.recompute in ("none", "cheap", "full"):
        m.zero_grad()
        m.logits(m(ids, cu_seqlens)).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in m.named_parameters()})
    torch.cat([hf(row[None]).logits[0] for row in rows]).logsumexp(-1).sum().backward()
    for name, p in hf.named_parameters():
        scale = p.grad.abs().max()
        assert (gradients[0][name] - p.grad).abs().max() <= 1e-4 * scale, name
        assert all(torch.equal(gradients[0][name], other[name]) for other in gradients[1:]), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_model_loads_in_transformers(tmp_path: Path, kind: str, tied: bool, dtype: torch.dtype | None) -> None:
    peer(kind, tied).save_pretrained(tmp_path / "hf")
    m = qwen.load(tmp_path / "hf")
    qwen.save(m, tmp_path / "ours", dtype)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is KINDS[kind][1]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.dtype == (dtype or torch.float32) and back.config.rope_parameters["rope_theta"] == 5e4
    for name, p in m.named_parameters():
        assert torch.equal(back.state_dict()[name], p.to(back.dtype)), name
    assert qwen.load(tmp_path / "ours").config == m.config
    ids, cu_seqlens = packed(tokens(60))
    expected = back.to(m.head.dtype)(ids[None]).logits[0]  # also RoPE survives
    if dtype is None:
        assert (m.logits(m(ids, cu_seqlens)) - expected).abs().max() <= 1e-5


def test_dtype_of_the_loaded_model(folder: Path) -> None:
    m = qwen.load(folder, torch.bfloat16)
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert m(*packed(tokens(4))).dtype == torch.bfloat16


def test_new_model_has_the_initial_weights_of_transformers() -> None:
    config = ModelConfig(400, 64, 96, 2, 4, 2, 16, 1e-6, 1e4, True, 128, 1, qkv_bias=True)
    torch.manual_seed(0)
    m = qwen.Qwen3(config)
    for name, p in m.named_parameters():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert abs(p.std().item() - 0.02) < 0.002 and abs(p.mean().item()) < 0.002, name


# -- configs that are refused --------------------------------------------------------------------------------------


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, ["model_type", "'mistral'", "'qwen3'", "'qwen2'", "'llama'"]),
        ({"model_type": ["qwen3"]}, ["model_type", "['qwen3']"]),
        ({"model_type": "llama"}, ["architectures", "Qwen3ForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["architectures", "Qwen3MoeForCausalLM", "Qwen3ForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias", "True", "False"]),
        ({"attention_dropout": 0.1}, ["attention_dropout", "0.1", "0.0"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "yarn", "'llama3'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear", "'llama3'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling", "low_freq_factor"]),
        ({"rope_scaling": LLAMA3}, ["rope_parameters and rope_scaling differ"]),
        ({"rope_parameters": LLAMA3 | {"factor": 0.0}}, ["rope_parameters", "0.0", "positive"]),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, ["rope_parameters", "below the high one"]),
        ({"rope_parameters": LLAMA3 | {"attention_factor": 2.0}}, ["rope_parameters", "attention_factor"]),
        ({"rope_parameters": "llama3"}, ["rope_parameters", "an object"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ["rope_parameters", "yarn", "default"]),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2.0}}, ["rope_parameters", "factor"]),
        ({"rope_parameters": ..., "rope_theta": ...}, ["rope_theta", "missing"]),
        ({"rope_theta": 1e6}, ["rope_theta", "1000000.0", "equal"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"layer_types": [["full_attention"]]}, ["layer_types", "[['full_attention']]"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
        ({"auto_map": {"AutoModel": "modeling_own.py"}}, ["auto_map", "modeling_own.py"]),
        ({"mlp_bias": True}, ["mlp_bias", "True"]),
        ({"head_dim": ...}, ["head_dim", "missing"]),
        ({"head_dim": 15}, ["head_dim", "15", "even"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "4 over 3"]),
        ({"hidden_size": "48"}, ["hidden_size", "'48'", "integer"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "positive"]),
        ({"tie_word_embeddings": None}, ["tie_word_embeddings", "None"]),
        ({"eos_token_id": [1, VOCAB]}, ["eos_token_id", f"[1, {VOCAB}]", "below vocab_size"]),
        ({"eos_token_id": []}, ["eos_token_id", "[]"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_refused_config(folder: Path, changes: dict[str, object], words: list[str]) -> None:
    path = edit(folder, **changes)
    with pytest.raises(InputError) as error:
        qwen.load(folder)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(word in message for word in words), message


def test_config_of_transformers_4(folder: Path) -> None:
    """There rope_theta stands at the top level."""
    config = ModelConfig.from_json(folder / "config.json")
    edit(folder, rope_parameters=..., rope_theta=5e4, rope_scaling=None)
    assert ModelConfig.from_json(folder / "config.json") == config
    values = (VOCAB, 48, 56, 3, 4, 2, 16, 1e-6, 5e4, False, 512, 3, "qwen3", True, False, None, None)
    assert dataclasses.astuple(config) == values


# The public configurations: sizes and RoPE as their config.json has them, in transformers 4's form.
R1_DISTILL_QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("public", "parameters"), [(R1_DISTILL_QWEN_7B, 7_615_616_512), (LLAMA_31_8B, 8_030_261_248)], ids=["r1", "llama"]
)
def test_public_configs_without_head_dim(tmp_path: Path, public: dict, parameters: int) -> None:
    """The parameter counts are those on the models' Hub pages."""
    (tmp_path / "config.json").write_text(json.dumps(public))
    config = ModelConfig.from_json(tmp_path / "config.json")
    assert config.head_dim == 128 and config.qkv_bias == (config.model_type == "qwen2") and not config.qk_norm
    with torch.device("meta"):
        assert sum(p.numel() for p in qwen.Qwen3(config).parameters()) == parameters
    edit(tmp_path, num_attention_heads=27)
    with pytest.raises(InputError, match="head_dim is missing and hidden_size .* over num_attention_heads 27"):
        ModelConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@torch.no_grad()
def test_config_without_head_dim_computes_the_same(tmp_path: Path, kind: str) -> None:
    """hidden_size over num_attention_heads, as transformers has it."""
    hf = peer(kind, shape=(4, 2, 12, 48), rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    hf.save_pretrained(tmp_path)
    edit(tmp_path, head_dim=..., rope_parameters=..., rope_theta=5e4)
    ids, cu_seqlens = packed(tokens(9))
    m = qwen.load(tmp_path)
    assert (m.logits(m(ids, cu_seqlens)) - hf(ids[None]).logits[0]).abs().max() <= 1e-5


# -- weights that do not fit -----------------------------------------------------------------------------------------


def test_every_wrong_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(56, 48, dtype=torch.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(56, 48)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        qwen.load(folder)
    message = str(error.value)
    for part in (
        "model.norm.weight is missing",
        "model.layers.1.self_attn.q_norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight is of shape (3, 4), not (56, 48)",
        "model.layers.2.mlp.up_proj.weight is of dtype I8",
        "model.layers.0.self_attn.q_proj.bias is extra",
        "model.layers.7.mlp.up_proj.weight is extra",
    ):
        assert part in message
    assert "\n" not in message and message.count(" is ") == 6


def test_torn_and_missing_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    size = weights.stat().st_size
    found = f"model.safetensors: not a readable safetensors file .*; {size} bytes of {size + 100}"
    with pytest.raises(InputError, match=found):
        qwen.load(folder)
    weights.write_bytes(b"\xff" * 64)  # a header of 2^64 bytes
    with pytest.raises(InputError, match="model.safetensors: not a readable safetensors file"):
        qwen.load(folder)
    weights.write_bytes(b"")
    with pytest.raises(InputError, match="model.safetensors: not a readable safetensors file"):
        qwen.load(folder)
    weights.unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor model.safetensors.index.json"):
        qwen.load(folder)
    with pytest.raises(InputError, match="config.json: no such file"):
        qwen.load(folder / "nowhere")


@torch.no_grad()
def test_shards(tmp_path: Path) -> None:
    hf = peer()
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    m = qwen.load(tmp_path)
    for name, p in hf.named_parameters():
        assert torch.equal(m.state_dict()[name], p), name

    doubled = load_file(tmp_path / shards[0]) | load_file(tmp_path / shards[1])
    save_file(doubled, tmp_path / shards[1])
    with pytest.raises(InputError, match="is in two files"):
        qwen.load(tmp_path)
    (tmp_path / shards[0]).unlink()
    with pytest.raises(InputError, match=f"{shards[0]}: no such file"):
        qwen.load(tmp_path)


SHARDS = {
    "upwards": ("../outside.safetensors", "not a plain file name"),
    "absolute": ("/outside.safetensors", "not a plain file name"),
    "in a folder": ("a/b.safetensors", "not a plain file name"),
    "windows": ("..\\outside.safetensors", "not a plain file name"),
    "nul": ("a\0.safetensors", "not a plain file name"),
    "pickle": ("weights.bin", "not a [*].safetensors name"),
    "nothing": (".safetensors", "no such file"),
    "number": (7, "not a [*].safetensors name"),
    "link": ("link.safetensors", "a link out of the folder"),
    "chain": ("chain.safetensors", "a link out of the folder"),
    "folder": ("folder.safetensors", "no such file"),
    "pipe": ("pipe.safetensors", "no such file"),
}


@pytest.mark.parametrize(("shard", "words"), SHARDS.values(), ids=SHARDS.keys())
def test_malicious_shards_are_refused_before_they_are_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shard: object, words: str
) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "chain.safetensors").symlink_to(folder / "link.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = []
    monkeypatch.setattr(weights, "safe_open", lambda file, **how: opened.append(file))
    with pytest.raises(InputError, match=words) as error:
        qwen.load(folder)
    assert not opened and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_files_may_not_lead_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    with pytest.raises(InputError, match="a link out of the folder"):
        qwen.load(folder)


def test_the_links_of_the_hub_cache_are_good(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(blobs / f"hash of {name}")
        (snapshot / name).symlink_to(f"../../blobs/hash of {name}")
    assert qwen.load(snapshot).config.vocab_size == VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_do_not_stay_on_the_file(folder: Path, dtype: torch.dtype) -> None:
    """Once loaded, the folder may be changed or deleted: nothing of the model is a view of the mapping."""
    m = qwen.load(folder, dtype)
    before = {name: p.clone() for name, p in m.named_parameters()}
    with open(folder / "model.safetensors", "r+b") as f:  # in place, not another file under the name
        f.seek(f.seek(0, 2) // 2)
        f.write(b"\0" * 10_000)
        f.truncate()
    assert all(torch.equal(p, before[name]) for name, p in m.named_parameters())


def test_tied_checkpoint_that_repeats_its_head(tmp_path: Path) -> None:
    peer(tied=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    m = qwen.load(tmp_path)
    assert m.head is m.model.embed_tokens.weight and "lm_head.weight" not in m.state_dict()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight differs from the embedding"):
        qwen.load(tmp_path)
