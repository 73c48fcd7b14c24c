"""The training step against transformers, PEFT and plain arithmetic; splits, ranks, crashes."""

import errno
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import kto
import lora
import model as qwen
import train
from common import checkpoint, costs, endings, passes, training
from common.errors import InputError, MemoryFull, NumericsError
from common.model_config import ModelConfig
from common.ranks import Ranks, process_group

ALONE = Ranks(0, 1, torch.device("cpu"))
WORKER = Path(__file__).with_name("train_worker.py")


def tiny_model(path: Path) -> Path:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    model = qwen.Qwen3(config)
    with torch.no_grad():  # larger weights than at initialisation, so that log-ratios are worth measuring
        for p in model.parameters():
            p.mul_(3)
    qwen.save(model, path)
    return path


def make_rows(n: int, seed: int = 0) -> list[dict]:
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(1, 61, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()

    rows = []
    for i in range(n):
        completion = ids(5, 14)
        w = (torch.rand(len(completion), generator=g) * 2 + 0.4).tolist()
        row = {"id": f"row{i}", "chosen": i % 3 != 2, "prompt_ids": ids(2, 6)}
        rows.append(row | {"completion_ids": completion, "w": w})
    return rows


def as_rows(rows: list[dict]) -> list[data.Row]:
    return [data.Row(r["id"], r["chosen"], r["prompt_ids"], r["completion_ids"], torch.tensor(r["w"])) for r in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def group():
    with process_group() as ranks:
        yield ranks


def test_every_epoch_visits_each_row_once_and_the_paper_gets_its_327_steps():
    steps = train.step_rows(10, 4, 2, seed=3)
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(10))
    assert sum(steps[:3], []) != sum(steps[3:], [])  # another order
    assert len(train.step_rows(6973, 64, 3, seed=0)) == 327  # spec 2.5: 6973 rows, 109 steps an epoch


def test_mismatched_pairs_are_one_cycle_without_fixed_points():
    partner = train.mismatched(7, seed=5)
    seen, i = [], 0
    for _ in range(7):
        seen.append(i)
        i = partner[i]
    assert sorted(seen) == list(range(7)) and i == 0
    assert all(a != b for a, b in enumerate(partner))
    with pytest.raises(InputError, match="at least 2"):
        train.mismatched(1, 0)


def test_learning_rate_is_transformers_cosine_schedule():
    from transformers import get_cosine_schedule_with_warmup

    total, peak = 57, 3e-4
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * total), total)
    for step in range(total):
        assert training.learning_rate(step, total, 0.1, peak) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12
        )
        optimizer.step()
        schedule.step()


def oracle_gradients(base: Path, rows: list[dict], adapter: Path, partner: list[int], s: train.TrainSettings):
    """Loss, z0 and LoRA gradients by transformers + PEFT, one unpadded row at a time, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    policy = PeftModel.from_pretrained(hf, adapter, is_trainable=True).double()

    def logps(prompt, completion):
        ids = torch.tensor([prompt + completion])
        logits = policy(ids).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]

    kl = []
    for i, r in enumerate(rows):
        other = rows[partner[i]]["completion_ids"]
        with torch.no_grad():
            on = logps(r["prompt_ids"], other).sum()
            with policy.disable_adapter():
                kl.append(float(on - logps(r["prompt_ids"], other).sum()))
    z0 = max(0.0, sum(kl) / len(kl))
    total = 0.0
    for r in rows:
        w = torch.tensor(r["w"]).double()
        on = (w * logps(r["prompt_ids"], r["completion_ids"])).sum()
        with torch.no_grad(), policy.disable_adapter():
            off = (w * logps(r["prompt_ids"], r["completion_ids"])).sum()
        sign, weight = (1, s.lambda_c) if r["chosen"] else (-1, s.lambda_r)
        total = total + weight - weight * torch.sigmoid(s.beta * sign * (on - off - z0))  # Eq. 11-12 as printed
    loss = total / len(rows)
    loss.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in policy.named_parameters() if p.requires_grad}
    return float(loss.detach()), z0, grads


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_step_equals_transformers_and_peft_in_fp64(base, group, tmp_path, micro_batch):
    rows = make_rows(8)
    s = train.TrainSettings(lora_r=3, lora_alpha=6.0, micro_batch=micro_batch, beta=0.2)
    model = qwen.load(base).requires_grad_(False)
    trainer = train.Trainer(model, as_rows(rows), "mralign", s, group, "torch")
    reference = trainer.reference_sums()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(torch.randn(p.shape, generator=g) * 0.1)  # away from B = 0
    lora.save(model, tmp_path, str(base))
    indices = list(range(8))
    z0, _ = trainer.z0(indices, reference)
    loss = kto.metrics(trainer.backward(indices, reference, z0))["loss"]
    want_loss, want_z0, want = oracle_gradients(base, rows, tmp_path, trainer.partner, s)
    assert want_z0 > 0.01  # the test means something
    assert float(z0) == pytest.approx(want_z0, rel=1e-4)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert len(want) == len(trainer.parameters)
    for name, p in lora.state(model).items():
        error = (p.grad.double() - want[name]).norm() / want[name].norm()
        assert error < 1e-4, (name, error)  # fp32 rounding over two layers is some 1e-6


STEPS = {"batch_size": 5, "epochs": 2, "lr": 3e-3, "sft_lr": 3e-3, "lora_r": 3, "lora_alpha": 6.0, "z0_ema": 0.3}


@pytest.fixture
def double():
    """Adapters and sums are float64 inside."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows_for(method: str) -> list[dict]:
    return [r for r in make_rows(14) if r["chosen"] or method != "sft"]


@functools.cache
def plain_steps(base: Path, method: str) -> tuple[list[dict], qwen.Qwen3]:
    """What the plain loop yields in float64, and the model with its adapters: made once, to be looked at only."""
    model = qwen.load(base, torch.float64).requires_grad_(False)
    return list(train.plain_loop(model, as_rows(rows_for(method)), method, train.TrainSettings(**STEPS))), model


def same_steps(got: list[dict], want: list[dict], method: str) -> None:
    assert len(got) == len(want) >= 4
    for mine, plain in zip(got, want, strict=True):
        for name in ["loss", "grad_norm"] + ["z0"] * kto.LOSSES[method].z0:
            assert mine[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-6), (mine["step"], name)
    assert want[-1]["loss"] != pytest.approx(want[0]["loss"], rel=1e-3)  # something was learned meanwhile
    assert not kto.LOSSES[method].z0 or max(row["z0"] for row in want) > 0.01


SPLITS = [
    {"micro_batch": 2},
    {"micro_tokens": 20},  # of rows of up to 18: one at a time, or the two shortest
    {"micro_tokens": 33, "recompute": "cheap"},
    {"micro_batch": 2, "micro_tokens": 33, "recompute": "full"},
    {},
]


@pytest.mark.parametrize(
    "method, split", [(m, s) for m in kto.LOSSES for s in (SPLITS if m == "mralign" else SPLITS[1:3])]
)
def test_the_trainer_is_the_plain_loop(base, group, double, method, split):
    """Loss, z0 and gradient norm of every step, however the rows are split and whatever is recomputed."""
    want, model = plain_steps(base, method)
    s = train.TrainSettings(**STEPS, **split)
    rows = as_rows(rows_for(method))
    trainer = train.Trainer(qwen.load(base, torch.float64).requires_grad_(False), rows, method, s, group, "torch")
    reference, steps = trainer.reference_sums(), train.step_rows(len(rows), s.batch_size, s.epochs, s.seed)
    got = [{"step": k + 1, **trainer.step(k, len(steps), step, reference)} for k, step in enumerate(steps)]
    same_steps(got, want, method)
    for (name, p), q in zip(lora.state(model).items(), trainer.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "method", ["mralign", *(pytest.param(x, marks=pytest.mark.long) for x in ("sft", "apo_zero_unpaired"))]
)
def test_two_ranks_are_the_plain_loop(tmp_path, base, launch, double, method):
    """Rows are grouped by tokens, so the ranks have different numbers of passes in some steps."""
    want, _ = plain_steps(base, method)
    extra, s = ["--double", "--method", method], STEPS | {"micro_tokens": 24}
    rows = as_rows(rows_for(method))
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rows]
    orders = [sorted(step, key=lambda i: (-lengths[i], i)) for step in train.step_rows(len(rows), 5, 2, 0)]
    counts = [[len(passes.grouped(order[k::2], lengths, passes.Limit(tokens=24))) for k in (0, 1)] for order in orders]
    assert any(a != b for a, b in counts)
    out, done = launch(tmp_path, base, method, rows_for(method), 2, extra=extra, **s)
    assert not any(done.codes), done.stderr
    same_steps(read(out)[1], want, method)


@pytest.mark.parametrize("method", ["sft", "mralign", "apo_zero_unpaired"])
def test_the_plain_loop_is_autograd_through_full_logits(base, double, method):
    """transformers and PEFT in float64, a row at a time, the loss as the papers print it, torch's AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    want, _ = plain_steps(base, method)
    s, rows = train.TrainSettings(**STEPS), rows_for(method)
    fresh = qwen.load(base, torch.float64)
    lora.add(fresh, s.lora_r, s.lora_alpha, seed=s.seed)
    start = lora.state(fresh)
    config = LoraConfig(r=s.lora_r, lora_alpha=s.lora_alpha, target_modules=list(lora.TARGETS))
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), config).double()
    named = {n.replace(".default", ""): p for n, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(start[name])

    def logp(prompt, completion):  # (T,)
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]

    def ratio(prompt, completion):
        with torch.no_grad(), policy.disable_adapter():
            off = logp(prompt, completion)
        return logp(prompt, completion) - off

    optimizer, state = torch.optim.AdamW(named.values(), weight_decay=0.0), 0.0
    steps, partner = train.step_rows(len(rows), 5, 2, seed=0), train.mismatched(len(rows), seed=0)
    for number, step in enumerate(steps[:3]):
        batch = [rows[i] for i in step]
        with torch.no_grad():
            kl = [float(ratio(rows[i]["prompt_ids"], rows[partner[i]]["completion_ids"]).sum()) for i in step]
        state = 0.3 * state + 0.7 * sum(kl) / len(kl)
        z0 = max(0.0, state)
        losses = []
        for r in batch:
            sign, weight = (1, s.lambda_c) if r["chosen"] else (-1, s.lambda_r)
            if method == "sft":
                nats = -logp(r["prompt_ids"], r["completion_ids"]).sum()
                losses.append(nats / sum(len(x["completion_ids"]) for x in batch) * len(batch))
                continue
            reward = (torch.tensor(r["w"]).double() * ratio(r["prompt_ids"], r["completion_ids"])).sum()
            reward = reward - z0 * kto.LOSSES[method].z0
            losses.append(weight - weight * torch.sigmoid(s.beta * sign * reward))
        loss = sum(losses) / len(losses)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in named.values()]).norm()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.param_groups[0]["lr"] = (0.0, 3e-3, 3e-3 * 0.5 * (1 + math.cos(math.pi / 5)))[number]
        optimizer.step()
        optimizer.zero_grad()
        assert want[number]["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)  # transformers' norms are float32
        assert want[number]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert method == "sft" or want[number]["z0"] == pytest.approx(z0, rel=1e-4, abs=1e-6)


def test_z0_from_a_share_of_the_rows_is_the_mean_over_the_first_of_them(base, group):
    rows = make_rows(7)

    def z0_of(indices, **settings):
        s = train.TrainSettings(lora_r=3, lora_alpha=6.0, micro_batch=1, **settings)
        trainer = train.Trainer(qwen.load(base).requires_grad_(False), as_rows(rows), "kto", s, group, "torch")
        reference = trainer.reference_sums()
        with torch.no_grad():
            for p in trainer.parameters:
                p.add_(0.02)
        return trainer.z0(indices, reference)[1]

    order = [4, 1, 6, 0, 2]
    each = [z0_of([i]) for i in order]  # one row, one pair
    assert max(each) - min(each) > 0.01
    assert z0_of(order) == pytest.approx(sum(each) / 5, abs=1e-5)
    assert z0_of(order, kl_rows=0.5) == pytest.approx(sum(each[:3]) / 3, abs=1e-5)  # ceil(2.5) rows
    assert z0_of(order, kl_rows=0.01) == pytest.approx(each[0], abs=1e-5)
    with pytest.raises(InputError, match="--kl-rows is 0.0, must be a finite number above 0 up to 1"):
        z0_of(order, kl_rows=0.0)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile cannot link from a path with a space in it")
def test_compiled_layers_give_the_same_gradients(base, group):
    """Two batches of different lengths, the second without a new compilation error; checkpointing on top."""
    gradients = []
    for settings in ({}, {"compile": True}, {"compile": True, "recompute": "full"}):
        s = train.TrainSettings(lora_r=2, lora_alpha=4.0, micro_batch=4, **settings)
        model = qwen.load(base).requires_grad_(False)
        trainer = train.Trainer(model, as_rows(make_rows(8)), "kto", s, group, "torch")
        reference = trainer.reference_sums()
        with torch.no_grad():
            for p in trainer.parameters:
                p.add_(0.02)
        trainer.backward(list(range(8)), reference, torch.tensor(0.1))
        gradients.append([p.grad for p in trainer.parameters])
    for eager, *compiled in zip(*gradients, strict=True):
        for grad in compiled:
            assert (grad - eager).norm() <= 1e-5 * eager.norm()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile cannot link from a path with a space in it")
def test_compiled_layers_in_bf16_are_as_far_from_fp32_as_eager_ones(base, group):
    """The compiler rounds in other places, so the two differ from each other as much as either does from fp32."""
    gradients = {}
    for name, dtype, compiled in (("fp32", torch.float32, False), *((c, torch.bfloat16, c) for c in (False, True))):
        s = train.TrainSettings(lora_r=2, lora_alpha=4.0, compile=compiled)
        model = qwen.load(base, torch.bfloat16).to(dtype).requires_grad_(False)  # the same rounded weights
        trainer = train.Trainer(model, as_rows(make_rows(8)), "kto", s, group, "torch")
        with torch.no_grad():
            for p in trainer.parameters:
                p.add_(0.02)
        trainer.backward(list(range(8)), trainer.reference_sums(), torch.tensor(0.1))
        gradients[name] = [p.grad for p in trainer.parameters]

    def errors(name):
        each = [float((g - t).norm() / t.norm()) for g, t in zip(gradients[name], gradients["fp32"], strict=True)]
        return torch.tensor(each)

    assert errors(False).median() > 0.01  # bf16 it was
    assert errors(True).median() < 1.3 * errors(False).median() and errors(True).max() < 1.3 * errors(False).max()


def test_what_the_compiler_does_by_itself_is_not_asked_for(base, group):
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0, compile=True, recompute="cheap")
    with pytest.raises(InputError, match="--recompute cheap is what --compile does"):
        train.Trainer(qwen.load(base).requires_grad_(False), as_rows(make_rows(4)), "kto", s, group, "torch")


def test_a_trace_of_one_step_is_left(base, group, tmp_path):
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0, batch_size=4, epochs=2, profile=2)
    model, origin = qwen.load(base).requires_grad_(False), {"rows": "r", "model": "m"}
    train.train(model, as_rows(make_rows(8)), "mralign", s, group, tmp_path, "torch", "tiny", origin, False)
    assert [p.name for p in tmp_path.glob("*trace*")] == ["trace-step-2.json"]
    events = json.loads((tmp_path / "trace-step-2.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("ph") == "X"]
    assert (
        names.count("_SegmentLogprob") == 1 and names.count("_SegmentLogprobBackward") >= 1
    )  # of one step, not of four
    assert any(name.startswith("Optimizer.step#AdamW") for name in names)


def test_all_ones_weights_make_mralign_kto_bit_for_bit(base, group):
    rows = [r | {"w": [1.0] * len(r["w"])} for r in make_rows(6)]
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0)
    gradients = []
    for method in ("kto", "mralign"):
        trainer = train.Trainer(qwen.load(base).requires_grad_(False), as_rows(rows), method, s, group, "torch")
        with torch.no_grad():
            for p in trainer.parameters:
                p.add_(0.01)
        reference = trainer.reference_sums()
        assert torch.equal(reference["weighted"], reference["plain"])
        trainer.backward(list(range(6)), reference, torch.tensor(0.1))
        gradients.append([p.grad for p in trainer.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_first_loss_must_be_half_the_mean_lambda(base, group):
    rows = as_rows(make_rows(9))  # 6 chosen, 3 rejected: 0.5 * (6 + 3 * 1.5) / 9
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0, batch_size=9)
    trainer = train.Trainer(qwen.load(base).requires_grad_(False), rows, "mralign", s, group, "torch")
    reference = trainer.reference_sums()
    assert trainer.step(0, 10, list(range(9)), reference)["loss"] == pytest.approx(10.5 / 18, abs=1e-5)
    trainer = train.Trainer(qwen.load(base).requires_grad_(False), rows, "mralign", s, group, "torch")
    shifted = {k: v + 1 for k, v in reference.items()}  # a reference that is not the base model
    with pytest.raises(NumericsError, match="must be 0.583333"):
        trainer.step(0, 10, list(range(9)), shifted)


def test_a_row_that_is_not_finite_stops_the_step_and_is_named(base, group):
    rows = as_rows(make_rows(4))
    rows[2].w[1] = float("nan")
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0)
    trainer = train.Trainer(qwen.load(base).requires_grad_(False), rows, "mralign", s, group, "torch")
    reference = trainer.reference_sums()
    with pytest.raises(NumericsError, match="row2"):
        trainer.step(0, 10, [0, 1, 2, 3], reference)


def test_sft_loss_is_the_step_mean_over_tokens(base, group):
    from transformers import AutoModelForCausalLM

    rows = make_rows(5)
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0, micro_batch=2)
    trainer = train.Trainer(qwen.load(base).requires_grad_(False), as_rows(rows), "sft", s, group, "torch")
    loss = trainer.step(0, 10, list(range(5)), trainer.reference_sums())["loss"]
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    nll = tokens = 0
    for r in rows:
        ids, labels = r["prompt_ids"] + r["completion_ids"], [-100] * len(r["prompt_ids"]) + r["completion_ids"]
        nll += hf(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * len(r["completion_ids"])
        tokens += len(r["completion_ids"])
    assert loss == pytest.approx(nll / tokens, rel=1e-5)


# Several processes


@dataclass
class Done:
    """How the ranks of one run ended, and what they wrote to stderr."""

    codes: list[int]
    stderr: str


class Server:
    """Runs of train_worker.py in processes that a ready one forks."""

    def __init__(self) -> None:
        command = [sys.executable, str(WORKER), "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, argv: list, world: int, log: Path) -> list[int]:
        """Process ids of a new run's ranks."""
        job = {"argv": [str(a) for a in argv], "world": world, "log": str(log)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def wait(self, log: Path) -> Done:
        print(file=self.process.stdin, flush=True)
        return Done(json.loads(self.process.stdout.readline()), log.read_text())

    def __call__(self, tmp_path: Path, base: Path, name: str, rows: list[dict], world: int = 1, extra=(), **s):
        """The run's folder and how it ended."""
        log = tmp_path / f"{name}.log"
        log.write_text("")
        self.start([*arguments(tmp_path, base, name, rows, **s), *extra], world, log)
        return tmp_path / name, self.wait(log)


def arguments(tmp_path: Path, base: Path, name: str, rows: list[dict], **s) -> list:
    files = [tmp_path / f"{name}.rows.json", tmp_path / f"{name}.settings.json"]
    files[0].write_text(json.dumps(rows))
    files[1].write_text(json.dumps({"lora_r": 2, "lora_alpha": 4.0, "lr": 1e-3} | s))
    return [tmp_path / name, "mralign", *files, base]


@pytest.fixture(scope="module")
def launch():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


RUN = {"batch_size": 4, "epochs": 2, "z0_ema": 0.5, "save_every": 2}  # 12 rows: 6 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, launch):
    """world -> the folder of a run of RUN that nothing interrupted. How often it saves does not matter."""

    @functools.cache
    def run(world: int) -> Path:
        out, done = launch(tmp_path_factory.mktemp("whole"), base, f"world{world}", make_rows(12), world, **RUN)
        assert not any(done.codes), done.stderr
        return out

    return run


def read(out: Path) -> tuple[dict, list[dict]]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / "adapter_model.safetensors"), metrics


def test_worlds_of_one_two_and_four_give_the_same_training(tmp_path, base, launch):
    """Five rows a step: four ranks hold 2, 1, 1, 1 of them, so some hold one class only, and none in the last step."""
    rows, s = make_rows(11), {"batch_size": 5, "micro_batch": 2, "epochs": 1, "warmup": 0.0}
    adapters, logs = [], []
    for world in (1, 2, 4):
        out, done = launch(tmp_path, base, f"world{world}", rows, world, **s)
        assert not any(done.codes), done.stderr
        adapter, log = read(out)
        adapters.append(adapter)
        logs.append(log)
    for adapter, log in zip(adapters[1:], logs[1:], strict=True):
        for ours, alone in zip(log, logs[0], strict=True):
            assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert ours["kl"] == pytest.approx(alone["kl"], rel=1e-4, abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        for name, tensor in adapter.items():
            torch.testing.assert_close(tensor, adapters[0][name], rtol=1e-4, atol=1e-5)
    assert all(tensor.abs().max() > 0 for tensor in adapters[0].values())  # B has left zero


def sha(out: Path) -> str:
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_killed_run_resumes_to_the_same_adapter_bit_for_bit(tmp_path, base, launch, whole):
    """The newest checkpoint is damaged meanwhile: it is named and kept, and the older one serves."""
    s = RUN
    torn, done = launch(tmp_path, base, "torn", make_rows(12), extra=["--die", "5"], **s)
    assert done.codes == [-9] and not (torn / "adapter_model.safetensors").exists()
    assert [p.name for p in checkpoint.found(torn)] == ["checkpoint-000002", "checkpoint-000004"]
    (torn / "checkpoint-000004" / "optimizer.safetensors").write_bytes(b"torn")
    _, done = launch(tmp_path, base, "torn", make_rows(12), extra=["--resume"], **s)
    assert not any(done.codes), done.stderr
    assert "continuing after step 2" in done.stderr
    assert "checkpoint-000004: damaged, optimizer.safetensors is not what was written" in done.stderr
    assert (torn / "damaged-checkpoint-000004" / "optimizer.safetensors").read_bytes() == b"torn"
    assert sha(torn) == sha(whole(1))
    assert read(torn)[1] == read(whole(1))[1]


@pytest.mark.parametrize("lines", [3, None, pytest.param(0, marks=pytest.mark.long)])
def test_a_checkpoint_brings_its_own_metrics(tmp_path, base, launch, whole, lines):
    """metrics.jsonl shorter than the checkpoint, empty or missing: the run goes on from the checkpoint's step."""
    shutil.copytree(whole(1), tmp_path / "run")
    run = tmp_path / "run"
    (run / "adapter_model.safetensors").unlink()
    checkpoint.remove(run / "checkpoint-000006")
    metrics = run / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)
    metrics.unlink()
    if lines is not None:
        metrics.write_text("".join(kept[:lines]))
    _, done = launch(tmp_path, base, "run", make_rows(12), extra=["--resume"], **RUN)
    assert not any(done.codes) and "continuing after step 4" in done.stderr, done.stderr
    assert sha(run) == sha(whole(1)) and read(run)[1] == read(whole(1))[1]


def test_damaged_checkpoints_alone_are_named_and_never_removed(tmp_path, base, launch, whole):
    shutil.copytree(whole(1), tmp_path / "run")
    run = tmp_path / "run"
    (run / "adapter_model.safetensors").unlink()
    names = [p.name for p in checkpoint.found(run)]
    for name in names:
        (run / name / "metrics.jsonl").write_text("")
    _, done = launch(tmp_path, base, "run", make_rows(12), extra=["--resume"], **RUN)
    assert done.codes == [3] and "step 1/" not in done.stderr
    assert all(f"{name}: metrics.jsonl is not what was written" in done.stderr for name in names)
    assert [p.name for p in checkpoint.found(run)] == names
    _, done = launch(tmp_path, base, "run", make_rows(12), **RUN)  # without --resume it starts at step 1
    assert not any(done.codes) and done.stderr.index("damaged") < done.stderr.index("step 1/6")
    assert all((run / f"damaged-{name}" / "adapter.safetensors").exists() for name in names)
    assert sha(run) == sha(whole(1))


def test_resume_refuses_a_changed_run_and_names_the_change(whole):
    with pytest.raises(InputError, match=r"\(lr was 0.001, is 0.002\)"):
        settings = train.TrainSettings(**RUN | {"lora_r": 2, "lora_alpha": 4.0, "lr": 2e-3})
        checkpoint.latest(whole(1), train.run_identity("mralign", settings, {"rows": "r", "model": "m"}))


@pytest.mark.parametrize(
    "world,name,code",
    [
        (1, "SIGTERM", 75),
        (2, "SIGINT", 130),
        pytest.param(2, "SIGTERM", 75, marks=pytest.mark.long),
        pytest.param(1, "SIGINT", 130, marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_its_last_step_and_goes_on_bit_for_bit(
    tmp_path, base, launch, whole, world, name, code
):
    """The signal comes in the middle of a step, after z0 has moved: nothing of that step may be saved."""
    s = RUN | {"save_every": 100}
    run, done = launch(tmp_path, base, "run", make_rows(12), world, extra=["--stop-by", name, 3], **s)
    assert done.codes == [code] * world, done.stderr
    assert [p.name for p in checkpoint.found(run)] == ["checkpoint-000003"]
    assert "stopped after step 3 of 6" in done.stderr
    _, done = launch(tmp_path, base, "run", make_rows(12), world, extra=["--resume"], **s)
    assert not any(done.codes) and "continuing after step 3" in done.stderr, done.stderr
    assert sha(run) == sha(whole(world)) and read(run)[1] == read(whole(world))[1]


@pytest.mark.long
def test_a_rank_that_dies_ends_the_others_and_torchrun_restarts_them_from_the_checkpoint(tmp_path, base, launch, whole):
    s = RUN
    run, done = launch(tmp_path, base, "run", make_rows(12), 2, extra=["--resume", "--die", 3, 1], **s)
    assert done.codes == [1, -9] and "gloo/transport" in done.stderr  # the survivor says why it ends
    assert not (run / "adapter_model.safetensors").exists()
    shutil.rmtree(run)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*torchrun, WORKER, *arguments(tmp_path, base, "run", make_rows(12), **s), "--resume", "--die", 3, 1]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "continuing after step 2" in done.stderr, done.stderr
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr  # torchrun names the first that died
    assert sha(run) == sha(whole(2)) and read(run)[1] == read(whole(2))[1]


@pytest.mark.long
def test_sharded_layers_give_what_whole_ones_do(tmp_path, base, launch):
    """Whatever is recomputed; with a pass before that is made for its memory, too."""
    s = {"batch_size": 5, "micro_batch": 2, "epochs": 1, "warmup": 0.0}
    runs = []
    for name, shard, recompute in (("whole", False, "none"), *((r, True, r) for r in costs.RECOMPUTE)):
        tried = ["--tried"] if name in ("cheap", "full") else []
        out, done = launch(tmp_path, base, name, make_rows(11), 2, extra=tried, shard=shard, recompute=recompute, **s)
        assert not any(done.codes), done.stderr
        runs.append(read(out))
    whole, whole_log = runs[0]
    for sharded, sharded_log in runs[1:]:
        for a, b in zip(whole_log, sharded_log, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["kl"] == pytest.approx(a["kl"], rel=1e-4, abs=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        for name, tensor in whole.items():
            torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "shard"])
def test_bf16_on_two_ranks_is_the_plain_loop_whatever_is_recomputed(tmp_path, base, launch, shard):
    """bf16 layers with fp32 masters, stacked under DDP and apart under --shard: the same bits at every level.

    The plain loop packs other rows together, so its products round differently; the losses are also those of the same
    rounded weights in fp32.
    """
    rows, runs, s = rows_for("mralign"), [], STEPS | {"lr": 3e-4}
    for recompute in costs.RECOMPUTE:
        how = s | {"micro_tokens": 24, "recompute": recompute, "shard": shard}
        out, done = launch(tmp_path, base, recompute, rows, 2, extra=["--bf16"], **how)
        assert not any(done.codes), done.stderr
        runs.append(read(out))
    for adapter, log in runs[1:]:
        assert log == runs[0][1] and all(torch.equal(adapter[name], x) for name, x in runs[0][0].items())
    half, exact = (qwen.load(base, torch.bfloat16).requires_grad_(False) for _ in range(2))
    loops = [train.plain_loop(m, as_rows(rows), "mralign", train.TrainSettings(**s)) for m in (half, exact.float())]
    for mine, in_half, in_fp32 in zip(runs[0][1], *loops, strict=True):
        assert mine["loss"] == pytest.approx(in_half["loss"], rel=2e-3), mine["step"]
        assert mine["loss"] == pytest.approx(in_fp32["loss"], rel=2e-2), mine["step"]
        assert mine["grad_norm"] == pytest.approx(in_half["grad_norm"], rel=0.03), mine["step"]


def test_sharding_leaves_half_of_every_layer_on_each_of_two_ranks(tmp_path, base, launch):
    """What --shard is for: the layers' weights held between passes, counted by the processes themselves."""
    log = tmp_path / "log"
    launch.start(["--held", base], 2, log)
    done = launch.wait(log)
    words = [line.split() for line in done.stderr.splitlines() if line.startswith("held")]
    assert len(words) == 2, done.stderr
    before = int(words[0][1])
    assert sum(int(w[2]) for w in words) == before and all(int(w[2]) <= 0.51 * before for w in words)
    assert {w[3] for w in words} == {"Parameter"}  # the head stays whole


def test_out_of_memory_names_the_rows_the_peak_and_the_flags(base, group, monkeypatch):
    rows = as_rows(make_rows(8))
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0, micro_batch=2)
    trainer = train.Trainer(qwen.load(base).requires_grad_(False), rows, "kto", s, group, "torch")
    longest = sorted(range(8), key=lambda i: (-trainer.lengths[i], i))[:2]

    def too_large(*args):
        torch.empty(1 << 52)  # 18 PB: what the allocator says is real

    reference = trainer.reference_sums()
    monkeypatch.setattr(train, "sequence_sums", too_large)
    with pytest.raises(MemoryFull) as caught, training.memory_named(trainer.memory_message):
        trainer.backward(list(range(8)), reference, torch.tensor(0.0))
    message, tokens = str(caught.value), sum(trainer.lengths[i] for i in longest)
    for i in longest:
        assert f"row{i} ({trainer.lengths[i]} tokens)" in message
    assert re.search(rf"peak \d+\.\d GB; use --micro-tokens {tokens // 2} or --recompute full or --shard", message)
    assert "\n" not in message and endings.ending(caught.value) == (5, message)
    with pytest.raises(RuntimeError, match="size"), training.memory_named(trainer.memory_message):
        torch.ones(2) @ torch.ones(3)  # another error stays what it is


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(tmp_path, base, launch, whole):
    """The kernel refuses to write files of more than so many bytes: enough for metrics, not for moments."""
    s = RUN
    run, done = launch(tmp_path, base, "run", make_rows(12), extra=["--die", "3"], **s)
    before = sorted(p.name for p in checkpoint.found(run))
    sizes = [p.stat().st_size for p in (run / "checkpoint-000002").iterdir()]
    server = launch.process.pid
    resource.prlimit(server, resource.RLIMIT_FSIZE, (max(sizes) - 1, resource.RLIM_INFINITY))
    _, done = launch(tmp_path, base, "run", make_rows(12), extra=["--resume"], **s)
    resource.prlimit(server, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert done.codes == [1] and "File too large" in done.stderr
    assert sorted(p.name for p in checkpoint.found(run)) == before
    _, done = launch(tmp_path, base, "run", make_rows(12), extra=["--resume"], **s)
    assert not any(done.codes), done.stderr
    assert sha(run) == sha(whole(1))
    assert endings.ending(OSError(errno.ENOSPC, ""))[0] == 75


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(p.name[-6:]) for p in checkpoint.found(run)), default=0)


@pytest.mark.long
def test_kills_at_random_moments_never_cost_the_run(tmp_path, base, launch):
    """A short version of the crash loop: kill -9 a random time after a random number of steps, go on, eight times."""
    s = {"batch_size": 2, "epochs": 6, "save_every": 1, "z0_ema": 0.5}  # 36 steps, a checkpoint each
    whole, done = launch(tmp_path, base, "whole", make_rows(12), **s)
    assert not any(done.codes), done.stderr
    run, log, chance = tmp_path / "run", tmp_path / "log", random.Random(0)
    log.write_text("")
    argv = [*arguments(tmp_path, base, "run", make_rows(12), **s), "--resume"]
    for _ in range(8):
        (pid,) = launch.start(argv, 1, log)
        target = newest(run) + chance.randrange(1, 4)
        while newest(run) < target:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))  # a step takes about as long, its checkpoint a part of it
        os.kill(pid, signal.SIGKILL)
        assert launch.wait(log).codes == [-9]
        assert checkpoint.latest(run, {})["step"] >= target
    launch.start(argv, 1, log)
    done = launch.wait(log)
    assert not any(done.codes), done.stderr
    assert sha(run) == sha(whole) and read(run)[1] == read(whole)[1]


# What is refused or said before and in the first steps


def checked(capsys, rows: list[data.Row], method: str = "kto", **s) -> str:
    """What `check_run` says on stderr for the tiny model: 61 ids, 128 positions."""
    config = SimpleNamespace(max_position_embeddings=128, vocab_size=61)
    train.check_run(rows, method, train.TrainSettings(**s), config, ALONE)
    return capsys.readouterr().err


def test_rows_that_the_model_cannot_take_are_named(capsys):
    def row(name, prompt, completion, top=60):
        return data.Row(name, True, [1] * prompt, [2] * (completion - 1) + [top], torch.ones(completion))

    assert "warning" not in checked(capsys, as_rows(make_rows(12)), batch_size=4)
    fits = [row("a", 28, 100), row("b", 8, 20)]
    with pytest.raises(
        InputError, match="^row b with the completion of row a, a pair of Eq. 2, has 129 tokens, .* 128"
    ):
        checked(capsys, [row("a", 28, 100), row("b", 29, 20)], batch_size=1)
    checked(capsys, [row("a", 28, 100), row("b", 29, 20)], "sft", batch_size=1)  # no such pair
    with pytest.raises(InputError, match="^row c has 129 tokens, the model 128 positions; leave"):
        checked(capsys, [*fits, row("c", 29, 100)], "sft", batch_size=1)
    with pytest.raises(InputError, match="^row d has token id 61, the model 61 tokens; use"):
        checked(capsys, [*fits, row("d", 2, 3, top=61)], batch_size=1)


def test_a_learning_rate_that_stays_0_is_refused(capsys):
    """Three rows make one step, and a warm-up of one step starts and ends at 0."""
    rows = as_rows(make_rows(3))
    with pytest.raises(InputError, match=r"^3 row\(s\) make 1 step\(s\), the learning rate is 0 in all .*--warmup 0"):
        checked(capsys, rows, epochs=1)
    checked(capsys, rows, epochs=1, warmup=0.0)
    checked(capsys, rows, epochs=2)
    with pytest.raises(InputError, match="--lr is 0.0, must be"):
        train.TrainSettings(lr=0.0)


def test_rows_of_one_class_only_are_said(capsys):
    rows = as_rows(make_rows(12))
    chosen, rejected = [r for r in rows if r.chosen], [r for r in rows if not r.chosen]
    assert "warning: all 8 rows are chosen; kto has no rejected ones" in checked(capsys, chosen, batch_size=2)
    assert "warning: all 4 rows are rejected; kto has no chosen ones" in checked(capsys, rejected, batch_size=2)
    assert checked(capsys, chosen, "sft", batch_size=2) == ""  # sft wants no others


def test_a_model_that_falls_apart_is_said_once_with_the_step(base, group, capsys):
    """Rows that the model itself finds likely, and a rate that ruins it in one step; guessing has log(1/61) = -4.1."""
    model = qwen.load(base).requires_grad_(False)
    rows = []
    for k in range(6):
        ids = [k + 1, 2 * k + 5]
        for _ in range(8):
            hidden = model(torch.tensor(ids), torch.tensor([0, len(ids)]))
            ids.append(int((hidden[-1] @ model.head.T).argmax()))
        rows.append(data.Row(f"row{k}", True, ids[:2], ids[2:], torch.ones(8)))
    s = train.TrainSettings(lora_r=2, lora_alpha=4.0, warmup=0.0, sft_lr=3.0)
    trainer = train.Trainer(model, rows, "sft", s, group, "torch")
    reference = trainer.reference_sums()
    log = [trainer.step(number, 4, list(range(6)), reference) for number in range(3)]
    nats = [row["logps/chosen"] / 8 for row in log]
    assert nats[0] > -math.log(61) > max(nats[1:])
    said = capsys.readouterr().err
    assert said.count("falls apart") == 1 and f"step 2: log-probability of {nats[1]:.1f} a token" in said, said


# ---------- rows that are held out


@pytest.mark.parametrize("method", ["mralign", "sft"])
def test_held_out_rows_are_measured_and_not_trained_on(tmp_path, base, group, double, method):
    """The training is that of the other rows alone; the margin is that of the last adapter, row by row."""
    rows = as_rows(rows_for(method) + [r | {"id": f"other{r['id']}"} for r in make_rows(16, seed=1) if r["chosen"]])
    rows += as_rows([r | {"id": f"third{r['id']}"} for r in make_rows(30, seed=2) if method != "sft" or r["chosen"]])
    held = training.held_out([r.id for r in rows], seed=0)
    assert 0 < len(held) < len(rows) / 4
    s = train.TrainSettings(**STEPS | {"epochs": 1}, eval_every=2)

    def run(out, given, settings):
        model = qwen.load(base, torch.float64).requires_grad_(False)
        train.train(model, given, method, settings, group, tmp_path / out, "torch", "x", {}, False)
        return model, [json.loads(x) for x in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    model, with_held = run("with", rows, s)
    _, without = run("without", [r for r in rows if r.id not in held], train.TrainSettings(**STEPS | {"epochs": 1}))
    plain = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in with_held]
    for mine, other in zip(plain, without, strict=True):
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-12)
    told = [row["step"] for row in with_held if "eval_logps/chosen" in row]
    assert told == sorted({*range(2, len(with_held) + 1, 2), len(with_held)})
    sides: dict[bool, list[float]] = {True: [], False: []}
    for r in rows:
        if r.id in held:
            with torch.no_grad():
                batch = data.pack([(r.prompt_ids, r.completion_ids, r.w)])
                own = train.sequence_sums(model, model.head, batch, "torch")
                with lora.disabled(model):
                    base_sums = train.sequence_sums(model, model.head, batch, "torch")
            sides[r.chosen].append(float(own[1] if method == "sft" else s.beta * (own[0] - base_sums[0])))
    last = with_held[-1]
    if method == "sft":
        assert last["eval_logps/chosen"] == pytest.approx(sum(sides[True]) / len(sides[True]), rel=1e-6)
        assert not any(k.startswith("eval_rewards") for k in last)
        return
    chosen, rejected = (sum(sides[k]) / len(sides[k]) for k in (True, False))
    assert last["eval_rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-6)
    assert abs(chosen - rejected) > 1e-4


def test_a_question_is_held_out_whole():
    names = [f"q{k}#{draw}" for k in range(400) for draw in range(3)]
    held = training.held_out(names, seed=1)
    questions = {name.partition("#")[0] for name in held}
    assert held == {name for name in names if name.partition("#")[0] in questions} and 20 <= len(questions) <= 60
    assert held == training.held_out(names[::-1], seed=1) != training.held_out(names, seed=2)
