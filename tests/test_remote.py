"""Sampling through a real HTTP server on loopback that runs the miniature: the same rows as without a server."""

import contextlib
import io
import json
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import masa_worker
import pytest
import torch

import lora
import model as qwen
import mralign
import sample
from common import verifier
from common.errors import ServiceError
from common.files import read_jsonl, write_jsonl
from common.ranks import process_group
from common.tokens import load_tokenizer, speller, token_offsets
from llm import chat, remote
from llm.client import Endpoint
from masa.problems import Prompts, load_problems
from masa.step import Masa

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "mini" / "model"


@contextlib.contextmanager
def completions_server(style: str, folder: Path = MODEL) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base URL, requests seen). style "ids" answers as vLLM does, "text" without ids, "broken" refuses the fourth,
    "shifted" sends end tokens too and says that every token was half a nat less likely than it is.

    It also loads and unloads adapters as vLLM does, from folders, and says in words that it has.
    """
    base, tokenizer, lock = qwen.load(folder), load_tokenizer(folder), threading.Lock()
    seen: list[dict[str, Any]] = []
    adapters: dict[str, qwen.Qwen3] = {}

    def load_or_unload(body: dict[str, Any]) -> None:
        if "lora_path" in body:
            adapters[body["lora_name"]] = qwen.load(folder)
            lora.load(adapters[body["lora_name"]], body["lora_path"])
        else:
            del adapters[body["lora_name"]]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(body)
                if style == "broken" and len(seen) == 4:
                    return self.answer(404, {"error": {"message": "no such model"}})
                if "lora_name" in body:
                    load_or_unload(body)
                    return self.answer(200, f"Success: {self.path}")
                net = adapters.get(body["model"], base)
                how = {name: body[name] for name in ("temperature", "top_p", "min_p")} | {
                    "top_k": max(0, body["top_k"])
                }
                stops = set(body["stop_token_ids"])
                (c,) = sample.generate(
                    net, [body["prompt"]], [body["seed"]], max_new=body["max_tokens"], stop_ids=stops, **how
                )
            shown = c.ids[:-1] if c.finish == "stop" and style != "shifted" else c.ids
            choice = {"index": 0, "finish_reason": c.finish, "stop_reason": None}
            choice["text"] = token_offsets(tokenizer, shown)[0]
            if style != "text":
                choice["token_ids"] = shown  # without the end token, as some versions have it
            if "logprobs" in body:  # from a full forward pass, half a nat less likely where style is "shifted"
                ids = torch.tensor([*body["prompt"], *shown])
                logits = net.logits(net(ids, torch.tensor([0, len(ids)]))) / body["temperature"]
                first = len(body["prompt"])
                logp = logits[first - 1 : -1].log_softmax(-1)[range(len(shown)), shown] - (style == "shifted") / 2
                choice["logprobs"] = {"token_logprobs": logp.tolist()}
            self.answer(200, {"choices": [choice]})

        def answer(self, status: int, value: dict[str, Any] | str) -> None:
            content = (value if isinstance(value, str) else json.dumps(value)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "few.jsonl"
    write_jsonl(path, read_jsonl(ROOT / "mini/questions/train.jsonl")[:4])
    return path


def draw(questions: Path, out: Path, *flags: str) -> SimpleNamespace:
    """Stage sample of the miniature, in this process: its exit code and what it said."""
    command = ["--config", "configs/mini.json", "--questions", str(questions), "--out", str(out), "--draws", "2"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.chdir(ROOT):
        code = mralign.main([*command, *flags, "sample"])
    return SimpleNamespace(returncode=code, stderr=said.getvalue())


@pytest.fixture(scope="module")
def local(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("local")
    done = draw(questions, out)
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("*.rank*")) and not list(out.glob("*.share*"))
    return drawn(out, "local float32 cpu")


def drawn(out: Path, engine: str) -> list[dict[str, Any]]:
    """The samples of a run but for who drew them, which must be `engine` in all of them."""
    rows = read_jsonl(out / "samples.jsonl")
    assert {row.pop("engine") for row in rows} == {engine}
    return rows


@pytest.mark.long
@pytest.mark.parametrize("style", ["ids", "text"])
def test_a_server_gives_the_rows_that_our_own_sampler_gives(style, questions, local, tmp_path):
    with completions_server(style) as (url, seen):
        done = draw(questions, tmp_path, "--backend", "openai", "--base-url", url, "--served-model", "mini")
    assert done.returncode == 0, done.stderr
    assert drawn(tmp_path, "openai mini") == local
    assert len(seen) == 16 and {body["model"] for body in seen} == {"mini"}
    assert {tuple(body["prompt"]) for body in seen} == {tuple(row["prompt_ids"]) for row in local}
    assert ("16 of 16 completions came without ids" in done.stderr) is (style == "text")


@pytest.mark.long
def test_what_was_answered_before_the_server_failed_is_not_asked_again(questions, local, tmp_path):
    with completions_server("broken") as (url, seen):
        flags = ["--backend", "openai", "--base-url", url, "--served-model", "mini", "--concurrency", "1"]
        done = draw(questions, tmp_path, *flags)
        assert done.returncode == 4
        (line,) = [x for x in done.stderr.splitlines() if x.startswith("error:")]
        assert "404 no such model" in line and "mini@http://127.0.0.1" in line
        assert not (tmp_path / "samples.jsonl").exists()
        kept = (tmp_path / "samples.rank0.jsonl").read_bytes()
        assert kept.count(b"\n") == 4  # the key and three rows
        (tmp_path / "samples.rank0.jsonl").write_bytes(kept + b'{"row": 9, "ids": [1')  # killed while writing
        done = draw(questions, tmp_path, *flags)
        assert done.returncode == 0 and "draws: 3 of 16 were finished before" in done.stderr
    assert len(seen) == 4 + 13 and drawn(tmp_path, "openai mini") == local


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "0.5", "true", "null", '"-0.5"'])
def test_a_log_probability_is_finite_and_not_above_zero(value):
    choice = json.loads(f'{{"logprobs": {{"token_logprobs": [{value}, -0.5]}}, "finish_reason": "length"}}')
    with pytest.raises(ServiceError, match="^there: a completion without .* log-probability"):
        remote.completion({"choices": [choice | {"token_ids": [1, 2]}]}, list, {7}, 7, "there", logprobs=True)
    server = SimpleNamespace(endpoint=SimpleNamespace(model="m"), post=lambda *_: {"choices": [choice]})
    with pytest.raises(ServiceError, match="no log-probability for every token"):
        remote.logprobs(server, [], [1, 2])


def test_a_reply_becomes_a_completion_or_an_error():
    def of(**choice: object) -> tuple[sample.Completion, bool]:
        return remote.completion({"choices": [choice]}, lambda text: [len(text)], {7, 8}, 7, "there")

    assert of(finish_reason="stop", token_ids=[1, 2, 8]) == (sample.Completion([1, 2, 8], "stop"), False)
    assert of(finish_reason="stop", token_ids=[1, 2], stop_reason=8) == (sample.Completion([1, 2, 8], "stop"), False)
    assert of(finish_reason="stop", token_ids=[1], stop_reason="\n") == (sample.Completion([1, 7], "stop"), False)
    assert of(finish_reason="length", token_ids=[1, 2]) == (sample.Completion([1, 2], "length"), False)
    assert of(finish_reason="stop", text="abc") == (sample.Completion([3, 7], "stop"), True)
    assert of(finish_reason="stop", text="", token_ids=None) == (sample.Completion([0, 7], "stop"), True)
    for bad in ({"finish_reason": "abort", "text": ""}, {"finish_reason": "stop"}, {"text": "x"}):
        with pytest.raises(ServiceError, match="^there: a completion"):
            of(**bad)
    for ids, said in (([-1, 5], "token -1"), ([9], "token 9"), ([2**31], "token 2147483648"), ([1] * 5, "5 tokens, 4")):
        with pytest.raises(ServiceError, match=f"^there: a completion .*{said}"):
            remote.check_ids(ids, range(9), 4, (), "there")
    remote.check_ids([1, 2, 8, 0], range(9), 4, (), "there")
    remote.check_ids([1, 2, 0, 8], range(9), 4, {7, 8}, "there")
    with pytest.raises(ServiceError, match="^there: a completion goes on after its end token 8"):
        remote.check_ids([1, 8, 0], range(9), 4, {7, 8}, "there")
    for odd in ([8], {}, "8", True, None):  # no id, so the end token of the model it is
        assert of(finish_reason="stop", token_ids=[1], stop_reason=odd)[0].ids == [1, 7]
    assert of(finish_reason="stop", text="\ud800 x") == (sample.Completion([3, 7], "stop"), True)  # read as "? x"
    for reply in ({}, {"choices": []}, {"choices": None}, {"choices": ["x"]}):
        with pytest.raises(ServiceError, match="^there: a completion"):
            remote.completion(reply, str.split, {7}, 7, "there")


@pytest.mark.parametrize(
    "choices",
    [
        [{"index": 1}],
        [{"index": "0"}],
        [{"index": True}],
        [{"index": 0}, {"index": 1}],
        [{"index": None}, {"index": None}],
    ],
)
def test_a_choice_that_nobody_asked_for_is_refused_in_one_line(choices):
    """One was asked for: of two, or of one with another number, nobody knows whether it answers this prompt."""
    said = {"finish_reason": "stop", "text": "Paris", "message": {"content": "Paris"}}
    reply = {"choices": [said | choice for choice in choices]}
    for read in (lambda: remote.completion(reply, len, {7}, 7, "there"), lambda: chat._content(reply, "there")):
        with pytest.raises(ServiceError, match="^there: a completion of . choice.*; one with index 0 was asked for"):
            read()
    for fine in ({"index": 0}, {"index": None}, {}):
        assert chat._content({"choices": [said | fine]}, "there") == ("Paris", "stop")


def test_a_text_must_be_what_its_ids_spell():
    """Servers strip, pad and now and then drop a piece; another answer, or another model's tokens, is refused."""
    tokenizer = load_tokenizer(MODEL)
    spell, end = speller(tokenizer), tokenizer.token_to_id("<|im_end|>")
    said = "<think>\nI recall that it is Paris, in the north of France.\n</think>\n\n<answer>Paris</answer>"
    ids = tokenizer.encode(said, add_special_tokens=False).ids
    bare = said.replace("<think>", "").replace("</think>", "")
    padded = said.replace("</think>", " </think> ")
    for text in (said, f"{said}<|im_end|>", bare, bare.strip(), padded, f" {said}", said.replace("that", ""), "", None):
        remote.check_text([*ids, end], text, spell, "there")
        remote.check_text(ids, text, spell, "there")
    cut = tokenizer.encode("Zürich", add_special_tokens=False).ids
    for text in ("Z\ufffd", "Z", "Z\ufffd\ufffd"):
        remote.check_text(cut[:2], text, spell, "there")
    other = said.replace("Paris", "Lyon")
    for text in (other, said.replace("recall", "recall, oh,"), "no", said[: len(said) // 2], said[::-1]):
        with pytest.raises(ServiceError, match="^there: the token ids of a completion do not spell its text, which"):
            remote.check_text([*ids, end], text, spell, "there")
    with pytest.raises(ServiceError, match="is it this model, with the same tokenizer"):
        remote.check_text([i + 1 for i in ids], said, spell, "there")


def test_backend_and_address_go_together(questions, tmp_path):
    done = draw(questions, tmp_path, "--backend", "openai")
    assert done.returncode == 3 and "--base-url" in done.stderr
    done = draw(questions, tmp_path, "--base-url", "http://127.0.0.1:1/v1")
    assert done.returncode == 3 and "--backend" in done.stderr


@pytest.mark.long
def test_a_policy_under_training_is_sampled_by_a_server_as_it_is_by_us(tmp_path, monkeypatch):
    """Two steps of GRPO at a learning rate that changes every sample: the same samples, the same adapter at the end."""
    folder = masa_worker.make_folder(tmp_path / "model")
    hashed = lambda text, gold, lenient: verifier.Grade(zlib.crc32(text.encode()) % 2 == 0, True)  # noqa: E731
    monkeypatch.setattr(verifier, "grade", hashed)

    def train(**where: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # what was measured, what was trained
        s = masa_worker.settings(folder, metas=0, max_new=9, eval_max_new=9, lr=0.1, out=str(tmp_path / "out"), **where)
        net = qwen.load(folder).requires_grad_(False)
        made = Masa(net, Prompts(folder, s), load_problems(s.problems)[0], s, ranks)
        rows = [made.step(number) for number in range(3)]
        rows += made.evaluate(3, "held", made.problems[:2])
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], made.names

    with process_group() as ranks:
        rows, names = train()
        with completions_server("ids", folder) as (url, seen):
            served, served_names = train(base_url=url, is_cap=0.0)
    assert served == rows and len({row["accuracy"] for row in rows[:3]}) > 1
    assert all(torch.equal(names[name], served_names[name]) for name in names)
    loads = [body["lora_name"] for body in seen if "lora_path" in body]
    assert loads == ["policy-0", "policy-1", "policy-2", "policy-3"]
    assert [body["lora_name"] for body in seen if body.keys() == {"lora_name"}] == loads[:-1]
    assert {body["model"] for body in seen if "model" in body} == set(loads)
    assert not any("logprobs" in body for body in seen)


def test_a_servers_log_probabilities_weigh_its_samples(tmp_path, monkeypatch):
    """One that samples as we do has weight 1. One that says half a nat less for each token has exp(1/2), or the cap."""
    folder = masa_worker.make_folder(tmp_path / "model")
    hashed = lambda text, gold, lenient: verifier.Grade(zlib.crc32(text.encode()) % 2 == 0, True)  # noqa: E731
    monkeypatch.setattr(verifier, "grade", hashed)

    def gradient(style: str, **where: Any) -> tuple[dict[str, Any], torch.Tensor]:
        with completions_server(style, folder) as (url, seen):
            s = masa_worker.settings(
                folder,
                metas=0,
                batch=2,
                max_new=9,
                eval_max_new=9,
                max_grad_norm=1e9,
                base_url=url,
                out=str(tmp_path / "out"),
                **where,
            )
            net = qwen.load(folder).requires_grad_(False)
            made = Masa(net, Prompts(folder, s), load_problems(s.problems)[0], s, ranks)
            made.optimizer = masa_worker.NoStep(made.names)
            row = made.step(0)
            made.evaluate(0, "held", made.problems[:1])
        asked = ["logprobs" in body for body in seen if "prompt" in body]
        assert asked == ([bool(s.is_cap)] * 8 + [False] * 4)  # not for an evaluation
        return row, torch.cat([g.flatten() for g in made.optimizer.grads[0].values()])

    with process_group() as ranks:
        _, plain = gradient("ids", is_cap=0.0)
        row, same = gradient("ids")
        assert row["server/mismatch"] < 1e-5 and row["server/weight"] == pytest.approx(1) and plain.norm() > 1e-3
        assert torch.allclose(same, plain, rtol=1e-4, atol=1e-6) and row["server/capped"] == 0
        row, more = gradient("shifted")
        assert row["server/mismatch"] == pytest.approx(0.5, abs=1e-4) and row["server/capped"] == 0
        assert row["server/weight"] == pytest.approx(1.64872, abs=1e-4)
        row, capped = gradient("shifted", is_cap=1.5)
        assert row["server/weight"] == 1.5 and row["server/capped"] == 1
        with pytest.raises(ServiceError, match="one log-probability for each of them.*--is-cap 0"):
            gradient("text")
    # Every token has the same weight, so the gradient has it.
    assert torch.allclose(more, plain * 1.64872, rtol=1e-3, atol=1e-6)
    assert torch.allclose(capped, plain * 1.5, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("updating", [True, False], ids=["updating allowed", "not allowed"])
def test_an_adapter_that_a_stopped_run_left_on_the_server_is_replaced(tmp_path: Path, updating: bool) -> None:
    """vLLM's rules: a name is loaded once, only a loaded one is unloaded, and neither without its variable."""
    loaded: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, load = body["lora_name"], self.path.endswith("/load_lora_adapter")
            good = updating and load == (name not in loaded)
            if good and load:
                loaded[name] = body["lora_path"]
            elif good:
                del loaded[name]
            reason = "cannot be found" if not load else "has already been loaded" if updating else "not enabled"
            text = b"Success" if good else json.dumps({"error": {"message": f"adapter {reason}"}}).encode()
            self.send_response(200 if good else 400)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"

    def publish(folder: str) -> None:
        with process_group() as ranks:
            served = remote.Served(Endpoint("base", url), 1, tmp_path / folder, lambda text: [])
            served.publish(lambda path: path.mkdir(parents=True), "2", ranks)

    try:
        if updating:
            publish("first")
            publish("resumed")
            (path,) = loaded.values()
            assert path == str((tmp_path / "resumed").resolve() / next(iter(loaded)))
        else:
            with pytest.raises(ServiceError, match="not enabled"):
                publish("first")
    finally:
        server.shutdown()
        server.server_close()
