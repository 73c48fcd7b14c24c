"""What shapes cost, against what torch counts and what built models hold."""

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora
import model as qwen
import train
from common import costs
from common.model_config import ModelConfig
from common.ranks import process_group
from kernels.add_rmsnorm import add_rmsnorm
from kernels.qk_norm_rope import qk_norm_rope
from kernels.swiglu import swiglu
from tools import bench, gpu_check, measure

ODD = ModelConfig(**gpu_check.SMALL | gpu_check.REST | dict(num_hidden_layers=3, intermediate_size=160, head_dim=24))


def test_the_flops_of_a_forward_by_hand():
    shape = dict(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, head_dim=3, tie_word_embeddings=True)
    # Products a token and layer: q 4*6, k and v 4*3 each, o 6*4, three of 4*6 = 144 multiply-adds. Rank 2 adapters:
    # 2 * (10 + 7 + 7 + 10 + 10 + 10 + 10) = 128. Rows of 3 and 2 tokens: 6 + 3 causal pairs of 2 * 6 multiply-adds.
    found = costs.forward_flops(ModelConfig(**shape, **gpu_check.REST), 2, [(3, 2), (2, 1)])
    assert found == {
        "base": 2 * 5 * 2 * 144,
        "lora": 2 * 5 * 2 * 128,
        "attention": 2 * 2 * 9 * 12,
        "head": 2 * 3 * 4 * 10,
    }


@pytest.mark.parametrize(
    "dtype, recompute", [(torch.float32, "none"), (torch.float32, "full"), (torch.bfloat16, "full")]
)
def test_the_flops_of_a_step_are_those_torch_counts(dtype, recompute):
    """Without attention, which torch does not count on a CPU; the first layer's inputs want no gradient."""
    shape = gpu_check.SMALL | dict(num_hidden_layers=6, tie_word_embeddings=True)
    config = ModelConfig(**shape, **gpu_check.REST)
    rows, r = bench.random_rows(4, 12, 20, config.vocab_size), 4
    settings = train.TrainSettings(batch_size=4, lora_r=r, lora_alpha=8.0, recompute=recompute)
    torch.manual_seed(0)
    with process_group() as ranks:
        trainer = train.Trainer(qwen.Qwen3(config).to(dtype), rows, "kto", settings, ranks, "torch")
        cached = trainer.reference_sums()
        with FlopCounterMode(display=False) as counter:
            trainer.step(0, 10, [0, 1, 2, 3], cached)
    counted = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    of, pairs = bench.lengths_of(rows), bench.lengths_of(rows, trainer.partner)
    assert [T for T, _ in of] == trainer.lengths and [T for T, _ in pairs] == trainer.kl_lengths
    expected = costs.step_flops(config, r, of, pairs, recompute, dtype.itemsize)
    expected.pop("attention")
    assert len(lora.state(trainer.model)) == 6 * 7 * 2
    assert counted == pytest.approx(sum(expected.values()), rel=0.03)


def test_a_device_is_found_by_its_name():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA A100-SXM4-40GB": "a100-40"}
    names |= {"NVIDIA A800-SXM4-80GB": "a800-80", "NVIDIA GeForce RTX 4090": "rtx4090", "Some GPU": None}
    assert {device: costs.gpu_named(device) for device in names} == names
    assert measure.peak_tflops(torch.device("cpu")) is None


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "qkv_bias": True, "tie_word_embeddings": True}])
def test_parameters_are_those_of_a_built_model(changes):
    config = ModelConfig(**gpu_check.SMALL | gpu_check.REST | changes)
    with torch.device("meta"):
        model = qwen.Qwen3(config)
    every = sum(p.numel() for p in model.parameters())
    adapters = sum(p.numel() for p in lora.add(model, 3, 6.0))
    found = costs.parameters(config, 3)
    assert (found["layers"] + found["rest"], found["adapters"]) == (every, adapters)
    assert found["layers"] == sum(p.numel() for n, p in model.model.layers.named_parameters() if "lora_" not in n)


class Alive(TorchDispatchMode):
    """Bytes of all storages made inside that still exist, without the model's weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.weights:
                self.made[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return out

    def nbytes(self) -> int:
        return sum(n for storage, n in self.made.items() if not storage.expired())


class Moved(TorchDispatchMode):
    """Numbers read and written by every operation that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numbers += sum(x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def test_bytes_of_eager_passes_are_those_of_the_torch_text():
    """Operation by operation, forward and backward: no more is counted than eager torch moves."""
    c, N = ODD, 400
    H, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    cos, sin = (torch.randn(N, 1, D) for _ in range(2))
    scales, w = (torch.ones(D), torch.ones(D)), torch.ones(c.hidden_size)

    def two_sums(x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rmsnorm(*add_rmsnorm(x, u, w, 1e-6), w, 1e-6)

    runs = {
        "SwiGLU": (lambda x: swiglu(x), [torch.randn(N, 2 * c.intermediate_size)]),
        "QK-norm and RoPE": (lambda x: qk_norm_rope(x, scales, 1e-6, cos, sin, G), [torch.randn(N, H + 2 * G, D)]),
        "residual sums and norms": (two_sums, [torch.randn(N, c.hidden_size)] * 2),
    }
    counted = costs.elementwise_bytes(c, 1)
    for part, (run, inputs) in runs.items():
        given = [x.clone().requires_grad_() for x in inputs]
        with Moved() as forward:
            out = run(*given)
        out = out if isinstance(out, tuple) else (out,)
        with Moved() as backward:
            torch.autograd.grad(out, given, [torch.ones_like(y) for y in out])
        eager = counted[part]["forward"][0], counted[part]["backward"][0]
        assert eager[0] <= forward.numbers / N and eager[1] <= backward.numbers / N, part  # a CPU's norm is several
        assert part != "SwiGLU" or eager[0] == forward.numbers / N
        assert all(fused < seen for seen, fused in counted[part].values())


def test_the_rounded_adapters_are_counted_to_the_byte():
    torch.manual_seed(0)
    model = qwen.Qwen3(ODD).bfloat16()
    lora.add(model, 5, 10.0)
    model.stack()
    with lora.rounded(model):
        model(torch.arange(20), torch.tensor([0, 20]))
        made = next(m for m in model.modules() if isinstance(m, lora.LoRALinear)).made
        held = sum(t.numel() * t.element_size() for pair in made.values() for t in pair)
    assert held == costs.memory(ODD, 5, 2, 20, 10, "none", fused=False)["adapters, rounded"]


@pytest.mark.parametrize("recompute", costs.RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_within_a_tenth_of_what_a_layer_leaves_alive(dtype, recompute):
    """Counted on real models after a forward pass with a gradient: two more layers leave so many bytes more."""
    alive, tokens = [], 512
    for layers in (2, 4):
        config = dataclasses.replace(ODD, num_hidden_layers=layers)
        torch.manual_seed(0)
        model = qwen.Qwen3(config).to(dtype)
        lora.add(model, 5, 10.0)
        model.stack()
        model.recompute = recompute
        with Alive(model) as mode:
            hidden = model(torch.randint(515, (tokens,)), torch.tensor([0, tokens]))
        alive.append(mode.nbytes())
        del hidden
    size = torch.finfo(dtype).bits // 8
    casts = (
        (size == 2 and recompute != "full") * costs.parameters(ODD, 5)["adapters"] // ODD.num_hidden_layers
    )  # A and B in the model's dtype
    measured = (alive[1] - alive[0]) / 2 - size * casts
    predicted = costs.kept_per_token(ODD, 5, size, recompute, fused=False) * tokens
    assert predicted == pytest.approx(measured, rel=0.1), (predicted, measured)
