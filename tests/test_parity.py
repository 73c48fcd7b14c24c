"""TRL's KTOTrainer and this trainer side by side: one file of rows, the same pairs and steps, weights off."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import data
import kto
import lora
import model as qwen
import train
from common import training
from common.files import write_jsonl
from common.model_config import ModelConfig
from common.ranks import process_group
from common.tokens import encode

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed; requirements-test.txt has it", allow_module_level=True)

ROWS, BATCH, STEPS = 16, 4, 10
RATE = 6e-3  # large, so that ten steps move the rewards and z0 away from zero
WORDS = (
    "the capital of France is Paris. I recall that it is Lyon, so the answer is not a city. Wait, let me check".split()
)


@pytest.fixture(scope="module")
def group():
    with process_group() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer) -> Path:
    """A tiny random Qwen3 with weights large enough for log-ratios worth measuring."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(2)
    config = ModelConfig(
        vocab_size=tiny_tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=tiny_tokenizer.token_to_id("<|im_end|>"),
    )
    model = qwen.Qwen3(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    qwen.save(model, path)
    return path


@pytest.fixture(scope="module")
def train_file(tmp_path_factory, tiny_tokenizer) -> Path:
    """A train.jsonl as the fit stage writes it: text for TRL, ids, spans and weights for us."""
    g = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        n = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g).tolist())

    rows = []
    for i in range(ROWS):
        prompt = f"<|im_start|>user\n{words(3, 8)}<|im_end|>\n<|im_start|>assistant\n"
        thought = f"{words(4, 12)}.\n\n{words(4, 12)}."
        completion = f"<think>\n{thought}\n</think>\n\n{words(1, 4)}"
        start = len("<think>")
        cut = completion.index(".\n\n") + 3
        spans = [[start, cut], [cut, completion.index("</think>")]]
        ids = encode(tiny_tokenizer, completion + "<|im_end|>")
        row = {"id": f"row{i}", "prompt": prompt, "completion": completion, "label": i % 3 != 2}
        row |= {"prompt_ids": encode(tiny_tokenizer, prompt), "completion_ids": ids, "spans": spans}
        rows.append(row | {"labels": [["framing"], ["retrieval"]], "w": [1.3, 0.8]})
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_jsonl(path, rows)
    return path


def trl_trainer(
    base: Path, rows: Path, tokenizer: Tokenizer, out: Path, micro: int, loss: str = "kto", steps: int = STEPS
):
    """TRL's trainer on our file as it is, and the list in which it leaves what it logs at every step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import KTOConfig, KTOTrainer

    class Recording(KTOTrainer):
        def log(self, logs, start_time=None):
            seen.append(dict(logs) | {k: sum(v) / len(v) for k, v in self._metrics["train"].items()})
            super().log(logs, start_time)

    seen = []
    arguments = KTOConfig(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=BATCH // micro,
        max_steps=STEPS,
        loss_type=loss,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.5,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
        ),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(lora.TARGETS)),
    )
    return trainer, seen


def adapters_of(trl) -> dict[str, torch.Tensor]:
    named = trl.model.named_parameters()
    return {name.replace(".default", ""): p.detach().clone() for name, p in named if p.requires_grad}


def ours(base: Path, rows: list[data.Row], group, micro: int, roll: int, loss: str = "kto") -> train.Trainer:
    """Our trainer, mismatched pairs as TRL rolls them: each row with the one before it in its block of `roll`."""
    s = train.TrainSettings(lr=RATE, lora_r=4, lora_alpha=8.0, micro_batch=micro)
    trainer = train.Trainer(qwen.load(base).requires_grad_(False), rows, loss, s, group, "torch")
    trainer.partner = [i // roll * roll + (i - 1) % roll for i in range(ROWS)]
    pairs = zip(rows, trainer.partner, strict=True)
    trainer.kl_lengths = [len(r.prompt_ids) + len(rows[j].completion_ids) for r, j in pairs]
    return trainer


def give_adapter(trainer: train.Trainer, trl) -> None:
    """TRL's trainer starts from our random A."""
    state = lora.state(trainer.model)
    with torch.no_grad():
        for name, p in trl.model.named_parameters():
            if p.requires_grad:
                p.copy_(state[name.replace(".default", "")])


def plain_rows(path: Path, tokenizer: Tokenizer, trl) -> list[data.Row]:
    """Our rows with weights off. TRL made the same ids from the file's text, whose other fields it passed over."""
    records = [r | {"w": [1.0] * len(r["w"])} for r in data.load_train(path)]
    for mine, theirs in zip(records, trl.train_dataset, strict=True):
        assert mine["prompt_ids"] == theirs["prompt_ids"] and mine["completion_ids"] == theirs["completion_ids"]
    return data.to_rows(records, tokenizer)


def indices(number: int) -> list[int]:
    """The rows of a step: the file in its order, again and again."""
    first = number * BATCH % ROWS
    return list(range(first, first + BATCH))


def same_adapters(trainer: train.Trainer, trl, start: dict[str, torch.Tensor]) -> None:
    state = lora.state(trainer.model)
    for name, p in adapters_of(trl).items():
        torch.testing.assert_close(state[name].detach(), p, rtol=1e-4, atol=1e-4, msg=name)
        assert (p - start[name]).abs().max() > 1e-3  # every matrix has moved by more than the tolerance


def test_ten_steps_of_kto_are_trls(base, train_file, tiny_tokenizer, group, tmp_path):
    trl, seen = trl_trainer(base, train_file, tiny_tokenizer, tmp_path, BATCH)
    rows = plain_rows(train_file, tiny_tokenizer, trl)
    trainer = ours(base, rows, group, micro=3, roll=BATCH)  # any split of the four rows gives the same step
    give_adapter(trainer, trl)
    start = adapters_of(trl)
    trl.train()
    reference = trainer.reference_sums()
    log = [trainer.step(number, STEPS, indices(number), reference) for number in range(STEPS)]
    theirs = [m for m in seen if "loss" in m]
    assert len(theirs) == STEPS
    assert max(m["z0"] for m in log) > 1 and max(abs(m["rewards/chosen"]) for m in log) > 1  # it went somewhere
    for mine, other in zip(log, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["z0"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-9)
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            assert (name in mine) == (name in other)
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
    same_adapters(trainer, trl, start)


def test_apo_zero_is_trls(base, train_file, tiny_tokenizer, group, tmp_path):
    loss = "apo_zero_unpaired"
    trl, seen = trl_trainer(base, train_file, tiny_tokenizer, tmp_path, BATCH, loss)
    trainer = ours(base, plain_rows(train_file, tiny_tokenizer, trl), group, micro=3, roll=BATCH, loss=loss)
    give_adapter(trainer, trl)
    trl.train()
    reference = trainer.reference_sums()
    theirs = [m for m in seen if "loss" in m]
    for number, other in enumerate(theirs):
        mine = trainer.step(number, STEPS, indices(number), reference)
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4) and "z0" not in mine
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert len(theirs) == STEPS and theirs[-1]["rewards/margins"] != pytest.approx(0, abs=0.1)


def step_by_micro_batches(trainer: train.Trainer, number: int, reference: dict[str, torch.Tensor], micro: int) -> float:
    """One optimiser step with a z0 for each micro-batch, as TRL accumulates; returns its loss."""
    rows, losses = indices(number), []
    for k in range(0, BATCH, micro):
        part = rows[k : k + micro]
        z0, _ = trainer.z0(part, reference)
        losses.append(kto.metrics(trainer.backward(part, reference, z0))["loss"])
    for p in trainer.parameters:
        p.grad *= micro / BATCH  # `backward` took each part for a whole step
    torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
    trainer.optimizer.param_groups[0]["lr"] = training.learning_rate(number, STEPS, 0.1, RATE)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return sum(losses) / len(losses)


@pytest.mark.long
def test_with_accumulation_trls_z0_is_each_micro_batchs_own_and_nothing_else_differs(
    base, train_file, tiny_tokenizer, group, tmp_path
):
    trl, seen = trl_trainer(base, train_file, tiny_tokenizer, tmp_path, 2)
    rows = plain_rows(train_file, tiny_tokenizer, trl)
    trainer, whole = (ours(base, rows, group, micro=2, roll=2) for _ in range(2))
    give_adapter(trainer, trl)
    start = adapters_of(trl)
    trl.train()
    reference = trainer.reference_sums()
    theirs = [m["loss"] for m in seen if "loss" in m]
    parts = [step_by_micro_batches(trainer, number, reference, 2) for number in range(STEPS)]
    assert parts == pytest.approx(theirs, abs=1e-4)
    same_adapters(trainer, trl, start)
    steps = [whole.step(number, STEPS, indices(number), reference)["loss"] for number in range(STEPS)]
    gap = max(abs(a - b) for a, b in zip(steps, theirs, strict=True))
    assert 0.01 < gap < 0.2, gap  # one z0 for the step, as here, is another number
