"""export.py: merges against transformers and PEFT, the check of a server against servers good and bad, the card."""

import json
import math
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peers
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora
import model as qwen
from common import hub
from common.errors import InputError
from common.files import write_json
from common.ranks import Ranks
from llm import client
from pipeline import reporting, room
from pipeline.config import RunConfig
from pipeline.run import Run
from report import card
from tools import export

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant"
)


def checkpoint(folder: Path, tokenizer: Any, kind: str = "qwen3", dtype: torch.dtype = torch.float32) -> hub.Source:
    """A random sharded model with its tokenizer."""
    hf = peers.peer(kind, vocab_size=tokenizer.get_vocab_size(), initializer_range=0.1).to(dtype)
    hf.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    (folder / "notes.txt").write_text("not part of a model")
    return hub.Source(folder, str(folder))


def adapter(folder: Path, base: hub.Source, size: float) -> Path:
    """An adapter whose entries of B are of order `size`."""
    m = qwen.load(base.folder)
    generator = torch.Generator().manual_seed(1)
    for i, p in enumerate(lora.add(m, r=4, alpha=8)):
        if i % 2:
            p.data.normal_(std=size, generator=generator)
    lora.save(m, folder, base.name, base.commit)
    return folder


# ---------- merging


@pytest.mark.parametrize("kind", peers.KINDS)
@torch.no_grad()
def test_merged_folder_is_the_model_with_its_adapter(tmp_path: Path, tiny_tokenizer: Any, kind: str) -> None:
    base = checkpoint(tmp_path / "base", tiny_tokenizer, kind)
    path = adapter(tmp_path / "adapter", base, 0.1)
    assert export.main(["merge", str(path), str(tmp_path / "merged")]) == 0
    names = {p.name for p in base.folder.iterdir()}
    assert len([n for n in names if n.endswith(".safetensors")]) > 2
    assert {p.name for p in (tmp_path / "merged").iterdir()} == names - {"notes.txt"}
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), path).eval()
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = theirs(ids).logits
    assert (merged(ids).logits - expected).abs().max() <= 2e-5
    with theirs.disable_adapter():
        assert (theirs(ids).logits - expected).abs().max() > 0.1


def test_bf16_weights_are_rounded_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    base = checkpoint(tmp_path / "base", tiny_tokenizer, dtype=torch.bfloat16)
    path = adapter(tmp_path / "adapter", base, 0.2)
    got = export.merge(base, path, tmp_path / "merged")
    assert 0 < got["kl"] < export.MAX_KL < got["effect"] and got["greedy"] >= export.MIN_GREEDY
    factors = load_file(path / lora.WEIGHTS)
    before, after = (load_all(folder) for folder in (base.folder, tmp_path / "merged"))
    assert before.keys() == after.keys() and len(factors) == 2 * 3 * 7
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        exact = before[name].double()
        layer = lora.PREFIX + name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in factors:
            A, B = (factors[f"{layer}.lora_{x}.weight"].double() for x in "AB")
            exact += 2.0 * B @ A  # alpha / r
        half_a_unit = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 9)  # bfloat16 has 8 bits
        assert ((weight.double() - exact).abs() <= half_a_unit * (1 + 1e-4)).all(), name


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_merge_that_rounds_the_training_away_is_refused(tmp_path: Path, tiny_tokenizer: Any, capsys: Any) -> None:
    base = checkpoint(tmp_path / "base", tiny_tokenizer, dtype=torch.bfloat16)
    path = adapter(tmp_path / "adapter", base, 1e-4)
    assert export.main(["merge", str(path), str(tmp_path / "merged")]) == 5
    message = capsys.readouterr().err
    assert "rounding costs" in message and "--dtype float32" in message
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}
    assert export.main(["merge", str(path), str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    m = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert m.dtype == torch.float32
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in m.parameters())


def test_comparison_by_hand() -> None:
    """p = (1/2, 1/2), (1/4, 3/4) against q = (1/4, 3/4), (1/4, 3/4)."""
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    got = export.compared(p, q)
    assert got["kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, abs=1e-6)
    assert got["max_logit"] == pytest.approx(math.log(2), abs=1e-6) and got["greedy"] == 0.5


@pytest.mark.parametrize(
    ("kl", "greedy", "effect", "words"),
    [
        (0.0, 1.0, 0.0, ""),
        (0.009, 0.95, 0.02, ""),
        (0.011, 1.0, 9.0, "mean KL 1.1e-02 nats is above 0.01"),
        (0.001, 0.94, 9.0, "greedy agreement 0.940 is below 0.95"),
        (0.001, 1.0, 0.0015, "rounding costs 1.0e-03 nats where training changed 1.5e-03"),
        (math.nan, 1.0, 1.0, "mean KL nan"),
    ],
)
def test_bounds_of_a_merge(kl: float, greedy: float, effect: float, words: str) -> None:
    problem = export.disagreement({"kl": kl, "greedy": greedy, "effect": effect})
    assert words in problem and bool(problem) == bool(words)


def test_bad_input(tmp_path: Path, tiny_tokenizer: Any, capsys: Any) -> None:
    base = checkpoint(tmp_path / "base", tiny_tokenizer)
    path = adapter(tmp_path / "adapter", base, 0.1)
    capsys.readouterr()
    cases = {
        "is there already": ["merge", str(path), str(base.folder)],
        "adapter_config.json: no such file": ["merge", str(tmp_path / "none"), str(tmp_path / "out")],
        "nothere: no such directory": ["commands", str(path), "--model", "/nothere"],
        "an endpoint must look like": ["serve-check", str(path), "localhost:8000"],
    }
    for words, argv in cases.items():
        assert export.main(argv) == 3
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    write_json(path / "adapter_config.json", config)
    assert export.main(["commands", str(path)]) == 3
    assert "base_model_name_or_path is None; give --model" in capsys.readouterr().err


# ---------- serving


def test_serve_commands_for_a_model_of_the_hub(tmp_path: Path) -> None:
    base = hub.Source(tmp_path / "cache", "Qwen/Qwen3-8B", "0123abcd")
    lines = card.serve_commands(base, tmp_path / "my run/mralign", 20).splitlines()
    path = f"'{tmp_path}/my run/mralign'"
    modules = f"'mralign={tmp_path}/my run/mralign'"
    model = "Qwen/Qwen3-8B --revision 0123abcd --enable-lora"
    assert lines == [
        "serve with vLLM:",
        f"  vllm serve {model} --max-lora-rank 32 --lora-modules {modules}",
        f"  python -m tools.export serve-check {path} mralign@http://127.0.0.1:8000/v1",
        "serve with SGLang:",
        f"  python -m sglang.launch_server --model-path {model} --max-lora-rank 20 --lora-paths {modules}",
        f"  python -m tools.export serve-check {path} Qwen/Qwen3-8B:mralign@http://127.0.0.1:30000/v1",
    ]
    local = card.serve_commands(hub.Source(tmp_path, "."), tmp_path / "x", 64)
    assert f"vllm serve {tmp_path} --enable-lora --max-lora-rank 64" in local and "--revision" not in local


class Handler(BaseHTTPRequestHandler):
    """/v1/completions with echo and logprobs, as vLLM answers; `said(ids)` are the log-probabilities of tokens 1..n."""

    said: Any
    seen: list[dict[str, Any]]

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body | {"path": self.path})
        values = type(self).said(body["prompt"])
        reply = json.dumps({"choices": [{"index": 0, "text": "...", "logprobs": {"token_logprobs": values}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any, tiny_tokenizer: Any) -> Iterator[tuple[Path, str, Any, type[Handler]]]:
    """An adapter, the server's address, transformers with PEFT as its engine, and the handler to set up."""
    tmp_path = tmp_path_factory.mktemp("served")
    base = checkpoint(tmp_path / "base", tiny_tokenizer)
    path = adapter(tmp_path / "adapter", base, 0.1)
    engine = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), path).eval()
    handler = type("Bound", (Handler,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield path, f"http://127.0.0.1:{server.server_address[1]}/v1", engine, handler
    server.shutdown()
    server.server_close()


@torch.no_grad()
def truth(engine: Any, ids: list[int]) -> list[float | None]:
    x = torch.tensor([ids])
    logp = engine(x).logits[0, :-1].log_softmax(-1).gather(-1, x[0, 1:, None])[:, 0]
    return [None, *logp.tolist(), -1.0]  # the token it was made to generate comes last


def ignoring(engine: Any, ids: list[int]) -> list[float | None]:
    with engine.disable_adapter():
        return truth(engine, ids)


def noisy(engine: Any, ids: list[int]) -> list[float | None]:
    return [None, *(x + 0.4 * (-1) ** i for i, x in enumerate(truth(engine, ids)[1:]))]


def generated_only(engine: Any, ids: list[int]) -> list[float | None]:
    return [-1.0]


def nothing(engine: Any, ids: list[int]) -> None:
    return None


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        (truth, 0, "the server shows 1.00"),
        (ignoring, 5, "the server does not serve this adapter"),
        (noisy, 5, "the server computes something else"),
        (generated_only, 4, "no log-probability for every token of the prompt"),
        (nothing, 4, "no log-probability for every token of the prompt"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_serve_check(served: Any, capsys: Any, behaviour: Any, code: int, words: str) -> None:
    path, url, engine, handler = served
    handler.seen.clear()
    handler.said = lambda ids: behaviour(engine, ids)
    assert export.main(["serve-check", str(path), f"my:adapter@{url}"]) == code
    out = capsys.readouterr()
    assert words in out.out + out.err, out
    body = handler.seen[0]
    assert body["path"] == "/v1/completions" and body["model"] == "my:adapter" and body["echo"] is True
    if behaviour is truth:
        assert len(handler.seen) == len(export.PROMPTS) and all(type(i) is int for i in body["prompt"])
        got = export.serve_check(export.open_base(path, "", ""), path, client.parse_endpoint(f"x@{url}"))
        assert got["off"] < 1e-4 and got["applied"] == pytest.approx(1, abs=1e-4)
        assert got["off_base"] == pytest.approx(got["effect"], abs=1e-4) and got["effect"] > 0.05
    if behaviour is ignoring:
        assert "0.00 (bounds" in out.out


def test_an_adapter_too_weak_to_check(served: Any, tmp_path: Path) -> None:
    path, url, _, _ = served
    base = export.open_base(path, "", "")
    weak = adapter(tmp_path / "weak", base, 1e-6)
    with pytest.raises(InputError, match="too little to tell it from none"):
        export.serve_check(base, weak, client.parse_endpoint(f"x@{url}"))


def test_a_report_asks_the_server_for_what_one_gpu_cannot_compute(
    served: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Policy and reference of a row, from this program and from a server that is transformers with PEFT."""
    path, url, engine, handler = served
    handler.said = lambda ids: (truth if handler.seen[-1]["model"] == "mralign" else ignoring)(engine, ids)
    run = object.__new__(Run)
    run.source, run.out = hub.Source(path.parent / "base", "my/base"), tmp_path
    run.ranks, run.methods = Ranks(0, 1, torch.device("cpu")), ["kto", "mralign"]
    run.cfg = RunConfig(method="kto,mralign", dtype="float32", backend="openai", base_url=url, kernel="torch")
    shutil.copytree(path, tmp_path / "mralign")
    row = {"prompt_ids": [5, 9, 31], "completion_ids": [7, 250, 12, 99, 3]}
    handler.seen.clear()
    here = reporting.token_logps(run)(row)
    assert not handler.seen
    monkeypatch.setattr(room, "holds", lambda cfg, config: False)
    there = reporting.token_logps(run)(row)
    assert [body["model"] for body in handler.seen] == ["mralign", "my/base"]
    assert all(body["prompt"] == row["prompt_ids"] + row["completion_ids"] for body in handler.seen)
    assert (there[0] - there[1]).abs().max() > 0.05
    for mine, theirs in zip(here, there, strict=True):
        assert mine.dtype == theirs.dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


# ---------- the card


def test_card(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Its head is what the Hub's own library reads, and every number is one that was given."""
    base = checkpoint(tmp_path / "base", tiny_tokenizer)
    path = adapter(tmp_path / "mralign", base, 0.1)
    of_hub = hub.Source(base.folder, "Qwen/Qwen3-8B", "0123abcd")
    rows = {"sha256": "feed", "chosen": 30, "rejected": 12, "datasets": {"sciq": 40, "own questions": 2}}
    scores = {"test": "| | Acc |\n|---|---|\n| base | 34.10 |"}
    card.write_card(path, of_hub, "mralign", {"lr": 5e-6}, rows, {"step": 327, "loss": 0.43219}, scores)
    written = ModelCard.load(path / "README.md")
    assert written.data.base_model == "Qwen/Qwen3-8B" and written.data.library_name == "peft"
    assert "mr-align" in written.data.tags
    for part in (
        "Qwen/Qwen3-8B at commit 0123abcd",
        "30 chosen, 12 rejected; SHA-256 of the file `feed`",
        "sciq, 40; licence: CC BY-NC 3.0 (no commercial use)",
        "own questions, 2; licence: not known here",
        "| loss | 0.43219 |",
        "## On test\n\n| | Acc |\n|---|---|\n| base | 34.10 |\n",
        "| lr | `5e-06` |",
        "vllm serve Qwen/Qwen3-8B --revision 0123abcd --enable-lora --max-lora-rank 8",
    ):
        assert part in written.text, part
    card.write_card(path, base, "kto", {}, rows, {}, {})
    written = ModelCard.load(path / "README.md")
    assert written.data.base_model is None and "Not evaluated yet." in written.text and "a local folder" in written.text
