"""What leaves a run: an adapter with its card, a merged checkpoint, the commands that serve it, the check of a server.

  python -m tools.export commands ADAPTER        how vLLM and SGLang serve it
  python -m tools.export merge ADAPTER OUT       a full Hugging Face folder, compared with the unmerged model
  python -m tools.export serve-check ADAPTER MODEL@BASE_URL    log-probabilities of a running server against ours

ADAPTER is the folder a run leaves under its --out; the base model is the one its adapter_config.json names, at the
commit it names. `merge` and `serve-check` first let the model with the adapter continue a few prompts greedily, then
compare on those tokens: with the merged model, or with what the server says. Both exit with 5 when they disagree.

Left out on purpose: uploads, quantised exports, several adapters at once.
"""

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import data
import lora
import sample
from common.endings import program
from common.errors import Disagreement, InputError
from common.files import read_json, sync_folder, write_json
from common.hub import Source, locate, member
from common.model_config import ModelConfig
from common.template import ChatTemplate
from common.tokens import encode, load_tokenizer
from common.weights import DTYPES, read_tensors, weight_files
from llm import client, remote
from model import Qwen3, load
from pipeline.ready import check_listens
from report.card import serve_commands

PROMPTS = (
    "Who wrote the novel Frankenstein?",
    "What is the capital of Australia?",
    "Which planet has the largest moon?",
    "In which year did the Berlin Wall fall?",
    "What gas do plants take in from the air?",
    "Who painted The Night Watch?",
    "How many bones does an adult human have?",
    "Which river flows through Vienna?",
)
CONTINUED = 32  # tokens
# What a merge may change, as means over the continued tokens. A bfloat16 merge rounds every weight once more; where
# training changed the weights by less than that rounding, it loses what was trained, hence the third bound.
MAX_KL = 0.01  # nats a token, KL(unmerged || merged)
MIN_GREEDY = 0.95  # share of tokens whose likeliest successor is the same
MAX_LOST = 0.5  # KL(unmerged || merged) over KL(unmerged || base)
# What a server may differ by: other kernels in bfloat16 move a token's log-probability by some hundredths of a nat.
MAX_OFF = 0.1  # nats, mean absolute difference
APPLIED = (
    0.5,
    1.5,
)  # how much of the adapter's effect the server shows: 0 when it ignores the adapter, 1 when it obeys
LEAST_EFFECT = 1e-3  # nats: below, an adapter cannot be told from none


# ---------- serving


@dataclass(frozen=True)
class Texts:
    """Token ids of a few prompts, and how a model with its adapter continues them."""

    prompts: list[list[int]]
    completions: list[list[int]]

    def batch(self) -> data.Batch:
        """All of them, packed."""
        rows = zip(self.prompts, self.completions, strict=True)
        return data.pack([(prompt, completion, torch.ones(len(completion))) for prompt, completion in rows])


def continued(model: Qwen3, folder: Path) -> Texts:
    """PROMPTS under the model's chat template and the model's own greedy continuation of each."""
    tokenizer, template = load_tokenizer(folder), ChatTemplate(folder)
    prompts = [encode(tokenizer, template.prompt(text, True)) for text in PROMPTS]
    done = sample.generate(model, prompts, [0] * len(prompts), max_new=CONTINUED, stop_ids=set(), temperature=0.0)
    return Texts(prompts, [c.ids for c in done])


@torch.no_grad()
def logits(model: Qwen3, texts: Texts) -> Tensor:
    """(M, V) fp32 on the CPU: the logits that predict each token of the continuations."""
    batch = texts.batch().to(model.head.device)
    return model.logits(model(batch.ids, batch.cu_seqlens)[batch.predict]).float().cpu()


def logprobs(logits: Tensor, texts: Texts) -> Tensor:
    """(M,) float64: log-probability of each token of the continuations, nats."""
    return logits.double().log_softmax(-1).gather(-1, texts.batch().targets[:, None])[:, 0]


def open_base(adapter: Path, model: str, revision: str) -> Source:
    """The base model: `model` at `revision` if given, else what the adapter's config names."""
    config = lora.read_config(adapter / lora.CONFIG)
    if model:
        return locate(model, revision)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{adapter / lora.CONFIG}: base_model_name_or_path is {name!r}; give --model")
    return locate(name, config.get("revision") or "")


def open_model(folder: Path, dtype: torch.dtype) -> Qwen3:
    """The model of a folder, on the GPU if there is one with room for it."""
    with torch.device("meta"):
        size = sum(p.numel() for p in Qwen3(ModelConfig.from_json(member(folder, "config.json"))).parameters())
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return load(folder, dtype, "cuda" if 1.2 * size * dtype.itemsize < room else "cpu")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a checkpoint's first tensor."""
    with safe_open(weight_files(folder)[0], framework="pt") as f:
        return DTYPES[f.get_slice(next(iter(f.keys()))).get_dtype()]


def serve_check(base: Source, adapter: Path, endpoint: client.Endpoint) -> dict[str, float]:
    """Ask a server for the log-probabilities of a few texts and compare them with the model's own.

    Uses /completions with `echo` and `logprobs`, which vLLM and SGLang answer for prompts of token ids. Returns off,
    off_base: mean absolute difference to the model with and without the adapter, nats a token; effect: the same between
    these two; applied: the share of the adapter's effect that the server shows (least squares).
    Raises InputError when the adapter is too weak to tell, client.ServiceError when the server does not answer so.
    """
    model = open_model(base.folder, stored_dtype(base.folder))
    lora.load(model, adapter)
    texts = continued(model, base.folder)
    ours = logprobs(logits(model, texts), texts)
    with lora.disabled(model):
        plain = logprobs(logits(model, texts), texts)
    effect = ours - plain
    if effect.abs().mean() < LEAST_EFFECT:
        raise InputError(
            f"{adapter}: it moves log-probabilities by {effect.abs().mean():.1e} nats a token, too little to tell it "
            "from none; check an adapter that was trained longer"
        )
    speaker = client.Client(endpoint)
    rows = zip(texts.prompts, texts.completions, strict=True)
    said = torch.tensor([x for row in rows for x in remote.logprobs(speaker, *row)], dtype=torch.float64)
    return {
        "off": (said - ours).abs().mean().item(),
        "off_base": (said - plain).abs().mean().item(),
        "effect": effect.abs().mean().item(),
        "applied": ((said - plain) @ effect / (effect @ effect)).item(),
    }


# ---------- merging


def merge(base: Source, adapter: Path, out: Path, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Write base + adapter as a full checkpoint, in the base's shards, and compare it with the unmerged model.

    Each weight is W + (alpha / r) B A in fp32, then cast to `dtype` (None: the dtype it is stored in); one shard is in
    memory at a time. Both models are then computed in fp32, so that what differs is the merge and not the arithmetic.
    `out` gets its name only when they agree (`disagreement`). Returns max_logit, kl, greedy (`compared`) and effect:
    the KL between the model with and without its adapter. Raises InputError, and Disagreement with nothing left behind.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; name a folder that is not")
    model = open_model(base.folder, torch.float32)
    lora.load(model, adapter)
    texts = continued(model, base.folder)
    unmerged = logits(model, texts)
    with lora.disabled(model):
        plain = logits(model, texts)
    del model
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_merged(base.folder, adapter, aside, dtype)
        merged = logits(open_model(aside, torch.float32), texts)
        result = compared(unmerged, merged) | {"effect": compared(unmerged, plain)["kl"]}
        if problem := disagreement(result):
            raise Disagreement(f"{out}: not kept, {problem}")
        sync_folder(aside)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return result


def compared(p: Tensor, q: Tensor) -> dict[str, float]:
    """Two (M, V) tensors of logits: largest difference, mean KL(p || q) in nats, share of equal argmax."""
    kl = [(a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1) for a, b in _double(p, q)]
    return {
        "max_logit": (p - q).abs().max().item(),
        "kl": torch.stack(kl).mean().item(),
        "greedy": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


def _double(p: Tensor, q: Tensor) -> Any:
    """Their rows in float64, a row at a time: a vocabulary is large."""
    return ((a.double(), b.double()) for a, b in zip(p, q, strict=True))


def disagreement(result: dict[str, float]) -> str:
    """What is wrong with a merge, "" when nothing is."""
    if not result["kl"] <= MAX_KL:
        return f"mean KL {result['kl']:.1e} nats is above {MAX_KL}; merge with --dtype float32"
    if not result["greedy"] >= MIN_GREEDY:
        return f"greedy agreement {result['greedy']:.3f} is below {MIN_GREEDY}; merge with --dtype float32"
    if not result["kl"] <= max(MAX_LOST * result["effect"], 1e-9):  # 1e-9: an adapter without effect
        lost = f"rounding costs {result['kl']:.1e} nats where training changed {result['effect']:.1e}"
        return f"{lost}; merge with --dtype float32"
    return ""


def _write_merged(folder: Path, adapter: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Every file of a model folder, the weights with the adapter folded in."""
    config = lora.read_config(adapter / lora.CONFIG)
    scale = config["lora_alpha"] / config["r"]
    factors = _factors(adapter)
    size, left = 0, set(factors)
    for file in weight_files(folder):
        tensors = {}
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # safe_open is no mapping
                tensor = f.get_tensor(name)
                to = dtype or tensor.dtype
                if name in factors:
                    tensor = lora.folded(tensor, *factors[name], scale)
                    left.remove(name)
                tensors[name] = tensor.to(to).contiguous()
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        with open(out / file.name, "rb") as f:
            os.fsync(f.fileno())
        size += sum(t.nbytes for t in tensors.values())
    assert not left, left  # the model took the adapter, so each of its layers has a weight
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja") or path.name == "merges.txt":
            shutil.copyfile(member(folder, path.name), out / path.name)
    index = out / "model.safetensors.index.json"
    if index.exists():
        write_json(index, read_json(index) | {"metadata": {"total_size": size}})
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        fields = read_json(out / "config.json")
        write_json(out / "config.json", fields | {"torch_dtype": name, "dtype": name})  # transformers 4 and 5


def _factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of a base weight -> (A, B) of its adapter, fp32."""
    with safe_open(adapter / lora.WEIGHTS, framework="pt") as f:
        shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    tensors = read_tensors([adapter / lora.WEIGHTS], shapes, {}, torch.float32, "cpu")
    ends = ".lora_A.weight", ".lora_B.weight"
    layers = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    return {
        f"{layer.removeprefix(lora.PREFIX)}.weight": (tensors[layer + ends[0]], tensors[layer + ends[1]])
        for layer in layers
    }


# ---------- the card


# ---------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 on a usage error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    texts = {
        "commands": "print the vLLM and SGLang commands",
        "merge": "write base + adapter as a full checkpoint",
        "serve-check": "compare a running server with the adapter",
    }
    for verb, text in texts.items():
        sub = verbs.add_parser(verb, help=text, allow_abbrev=False)
        sub.add_argument("adapter", type=Path, help="folder of the adapter")
        if verb == "merge":
            sub.add_argument("out", type=Path, help="folder to write, which must not exist")
            names = ["float32", "bfloat16"]
            sub.add_argument("--dtype", choices=names, help="dtype of the merged weights [as stored]")
        if verb == "serve-check":
            sub.add_argument("endpoint", help="MODEL@BASE_URL or MODEL@BASE_URL#KEY_VARIABLE")
        sub.add_argument("--model", default="", help="base model [what adapter_config.json names]")
        sub.add_argument("--revision", default="", help="its branch, tag or commit on the Hub")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks. Raises InputError, client.ServiceError, Disagreement."""
    base = open_base(args.adapter, args.model, args.revision)
    if args.verb == "commands":
        print(serve_commands(base, args.adapter, lora.read_config(args.adapter / lora.CONFIG)["r"]))
    elif args.verb == "merge":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}[args.dtype]
        got = merge(base, args.adapter, args.out, dtype)
        print(
            f"{args.out}: max logit difference {got['max_logit']:.1e}, mean KL {got['kl']:.1e} nats (bound {MAX_KL}),"
        )
        print(
            f"greedy agreement {got['greedy']:.3f} (bound {MIN_GREEDY}); training moved it by {got['effect']:.1e} nats"
        )
    else:
        endpoint = client.parse_endpoint(args.endpoint)
        check_listens(endpoint.base_url)
        got = serve_check(base, args.adapter, endpoint)
        print(f"{endpoint}: log-probabilities are off by {got['off']:.4f} nats a token (bound {MAX_OFF})")
        print(f"the server shows {got['applied']:.2f} (bounds {APPLIED}) of the effect of {got['effect']:.4f} nats")
        if not APPLIED[0] <= got["applied"] <= APPLIED[1]:
            raise Disagreement(
                f"{endpoint}: the server does not serve this adapter; compare its command with `commands`"
            )
        if not got["off"] <= MAX_OFF:
            raise Disagreement(f"{endpoint}: the server computes something else; compare base model, commit and dtype")
        print("good")


@program
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv)
    run(args)


if __name__ == "__main__":
    sys.exit(main())
