"""model.py against transformers' Qwen3ForCausalLM, and what it says about files that do not fit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import lora
import model as qwen
from files import InputError

VOCAB = 101
# query heads, key heads, head size, hidden size: GQA ratios 1, 2 and 4; head size * heads != hidden size
SHAPES = {"ratio 1": (4, 4, 16, 32), "ratio 2": (4, 2, 16, 48), "ratio 4": (8, 2, 12, 40)}


def peer(tied: bool = False, shape: tuple[int, ...] = SHAPES["ratio 2"], intermediate: int = 56) -> Qwen3ForCausalLM:
    """A random transformers model whose norms are not ones and whose logits are of order 1 to 10."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim, hidden = shape
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        eos_token_id=3,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    hf = Qwen3ForCausalLM(config).eval()
    for p in hf.parameters():
        if p.ndim == 1:
            p.data.uniform_(0.5, 1.5)
    return hf


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
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_transformers(tmp_path: Path, tied: bool, shape: tuple[int, ...]) -> None:
    """Packed, prefilled and decoded with a cache: each row as transformers computes it alone, uncached."""
    hf = peer(tied, shape)
    hf.save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    rows = tokens(5, 1, 70, 9)
    ids, cu_seqlens = packed(rows)
    expected = torch.cat([hf(row[None]).logits[0] for row in rows])
    assert (m.logits(m(ids, cu_seqlens)) - expected).abs().max() <= 1e-5

    cache = qwen.KVCache(m.config, 6, 80, torch.float32, "cpu")
    assert 6 * cache.bytes(m.config, 80, torch.float32, "cpu") == cache.k.nbytes + cache.v.nbytes
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


@torch.no_grad()
def test_decoding_in_groups_of_different_width(tmp_path: Path) -> None:
    """More rows than one group, lengths over several cache blocks: the full forward, row by row; bits do not move."""
    # Whole vectors of 32 in every layer: the CPU rounds silu otherwise in what is left over at the end of a tensor.
    peer(intermediate=64).save_pretrained(tmp_path)
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
    kept = cache.k[:, 0].clone()
    m(*packed([b]), cache, torch.tensor([2]))
    assert torch.equal(cache.k[:, 0], kept) and cache.lens.tolist() == [7, 0, 5]
    cache.copy([2], [1])
    out = decode(m, torch.tensor([9, 9, 9]), cache)
    assert torch.equal(out[1], out[2]) and cache.lens.tolist() == [8, 6, 6]
    cache.clear([1])
    with pytest.raises(AssertionError, match="must be empty"):
        m(*packed([a]), cache, torch.tensor([0]))


def test_stacked_weights_are_the_parameters(folder: Path) -> None:
    """Outside as before and still trainable; inside each product is one; a layer with an adapter keeps its own."""
    m = qwen.load(folder)
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    ids, cu_seqlens = packed(tokens(6, 3))
    expected = m(ids, cu_seqlens).detach()
    lora.add(m, r=2, alpha=4.0, targets=("q_proj",))
    with torch.inference_mode(), m.stacked():
        attn, mlp = m.model.layers[0].self_attn, m.model.layers[0].mlp
        assert attn.stacked is None and torch.equal(mlp.stacked[: len(mlp.gate_proj.weight)], mlp.gate_proj.weight)
        assert mlp.stacked.data_ptr() == mlp.gate_proj.weight.data_ptr()  # no copy is kept
        assert (m(ids, cu_seqlens) - expected).abs().max() <= 1e-5
    lora.merge(m)
    m.requires_grad_(True)
    m(ids, cu_seqlens).sum().backward()
    for name, tensor in m.named_parameters():
        assert torch.equal(tensor, before[name]) and (tensor.grad is None) == (name == "lm_head.weight")
    qwen.save(m, folder / "again")
    assert torch.equal(qwen.load(folder / "again")(ids, cu_seqlens), expected)


def test_gradients_equal_transformers_with_and_without_checkpointing(tmp_path: Path) -> None:
    hf = peer(tied=True)
    hf.save_pretrained(tmp_path)
    m = qwen.load(tmp_path)
    rows = tokens(6, 11)
    ids, cu_seqlens = packed(rows)
    gradients = []
    for m.gradient_checkpointing in (False, True):
        m.zero_grad()
        m.logits(m(ids, cu_seqlens)).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in m.named_parameters()})
    torch.cat([hf(row[None]).logits[0] for row in rows]).logsumexp(-1).sum().backward()
    for name, p in hf.named_parameters():
        scale = p.grad.abs().max()
        assert (gradients[0][name] - p.grad).abs().max() <= 1e-4 * scale, name
        assert torch.equal(gradients[0][name], gradients[1][name]), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_saved_model_loads_in_transformers(tmp_path: Path, tied: bool, dtype: torch.dtype | None) -> None:
    peer(tied).save_pretrained(tmp_path / "hf")
    m = qwen.load(tmp_path / "hf")
    qwen.save(m, tmp_path / "ours", dtype)
    back, info = Qwen3ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.dtype == (dtype or torch.float32) and back.config.rope_parameters["rope_theta"] == 5e4
    for name, p in m.named_parameters():
        assert torch.equal(back.state_dict()[name], p.to(back.dtype)), name
    assert qwen.load(tmp_path / "ours").config == m.config


def test_dtype_of_the_loaded_model(folder: Path) -> None:
    m = qwen.load(folder, torch.bfloat16)
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert m(*packed(tokens(4))).dtype == torch.bfloat16


def test_new_model_has_the_initial_weights_of_transformers() -> None:
    config = qwen.Config(400, 64, 96, 2, 4, 2, 16, 1e-6, 1e4, True, 128, 1)
    torch.manual_seed(0)
    m = qwen.Qwen3(config)
    for name, p in m.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
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
        ({"model_type": "llama"}, ["model_type", "'llama'", "'qwen3'"]),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["architectures", "Qwen3MoeForCausalLM", "Qwen3ForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias", "True", "False"]),
        ({"attention_dropout": 0.1}, ["attention_dropout", "0.1", "0.0"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "yarn", "None"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ["rope_parameters", "yarn", "default"]),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2.0}}, ["rope_parameters", "factor"]),
        ({"rope_parameters": ..., "rope_theta": ...}, ["rope_theta", "missing"]),
        ({"rope_theta": 1e6}, ["rope_theta", "1000000.0", "equal"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
        ({"head_dim": ...}, ["head_dim", "missing"]),
        ({"head_dim": 15}, ["head_dim", "15", "even"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "4 over 3"]),
        ({"hidden_size": "48"}, ["hidden_size", "'48'", "integer"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "positive"]),
        ({"tie_word_embeddings": None}, ["tie_word_embeddings", "None"]),
        ({"eos_token_id": [1, 2]}, ["eos_token_id", "[1, 2]", "one id"]),
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
    config = qwen.Config.from_json(folder / "config.json")
    edit(folder, rope_parameters=..., rope_theta=5e4, rope_scaling=None)
    assert qwen.Config.from_json(folder / "config.json") == config
    assert dataclasses.astuple(config) == (VOCAB, 48, 56, 3, 4, 2, 16, 1e-6, 5e4, False, 512, 3)


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


@pytest.mark.parametrize("shard", ["../outside.safetensors", "weights.bin", "a/b.safetensors"])
def test_shard_names_stay_in_the_folder(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(InputError, match="is not a plain"):
        qwen.load(folder)


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
