"""MASA with scripted completions: what every sample says is decided here, so every statistic of a step is known.

As a program it serves, as train_worker.py does: it forks processes that have imported everything. A job's argv is

    gradient FOLDER OUT STEP [--gate]   the gradient of step STEP on a model of `make_folder`, to OUT-RANK.safetensors;
                                        with --gate every second problem of the batch is foreseen to be always solved,
                                        which on two ranks leaves rank 1 without work
    command STDOUT ARGUMENT...          what `python -m masa ARGUMENT...` does, its standard output to the file STDOUT
"""

import os
import runpy
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from conftest import build_tokenizer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import model as qwen  # noqa: E402
from common.files import write_json, write_jsonl  # noqa: E402
from common.model_config import ModelConfig  # noqa: E402
from common.ranks import Ranks, process_group  # noqa: E402
from masa.problems import Problem, Prompts, load_problems, meta_text  # noqa: E402
from masa.rollouts import Rollout  # noqa: E402
from masa.settings import Settings  # noqa: E402
from masa.step import Masa  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_folder(folder: Path, n: int = 12) -> Path:
    """A tiny random model, and n problems k + k whose answers are right."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    end = tokenizer.token_to_id("<|im_end|>")
    kind = dict(rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True, num_key_value_heads=2)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512, eos_token_id=end, **kind, **sizes
    )
    torch.manual_seed(0)
    qwen.save(qwen.Qwen3(config), folder)
    rows = [{"id": f"p{k}", "problem": f"What is {k} + {k}?", "answer": 2 * k} for k in range(n)]
    write_jsonl(folder / "problems.jsonl", rows)
    (folder / "solve.txt").write_text("{problem}\n")
    (folder / "meta.txt").write_text("Foresee: {problem}\n")
    return folder


def settings(folder: Path, **values) -> Settings:
    """Small settings for a folder of make_folder."""
    small = dict(refill_tries=1, gate_floor=0.0, gate_probe=0.0)  # the gate alone; tests turn the rest on
    small |= dict(solutions=4, metas=4, batch=4, max_new=120, max_prompt=200, dtype="float32", lora_r=4, lora_alpha=8.0)
    prompts = {
        f"{k}_prompt": str(folder / f"{name}.txt")
        for k, name in (("solve", "solve"), ("meta", "meta"), ("eval", "solve"))
    }
    where = dict(model=str(folder), problems=str(folder / "problems.jsonl"), out=str(folder / "out"), meta_system="")
    return Settings(**(small | where | prompts | dict(eval_samples=4, lr=1e-3, warmup_steps=1) | values))


class Scripted(Masa):
    """MASA whose completions come from `script(problem, kind, k) -> text`, k the number of the draw."""

    def jobs(self, problem, kind, when, n, limit, hints=()):
        made = super().jobs(problem, kind, when, n, limit, hints)
        self.asked = getattr(self, "asked", [])
        self.asked += [(problem, kind, k, job) for k, job in enumerate(made)]
        return made

    def complete(self, jobs, temperature, what, trained=True):
        known = {id(job): (problem, kind, k) for problem, kind, k, job in self.asked}
        out = []
        for job in jobs:
            text = self.script(*known[id(job)])
            ids = [*self.prompts.encode(text), self.prompts.end]
            cut = len(ids) > job.limit
            ids = ids[: job.limit]
            out.append(Rollout(job.prompt_ids, ids, self.prompts.text(ids), cut, job.limit))
        return out


def say(problem: Problem, kind: str, k: int, rate: int | None = None) -> str:
    """A solution whose first k % 4 draws are right, or a meta with rate or k as its pass rate."""
    if kind == "meta":
        return meta_text(f"thought {k} about {problem.id}", ["carry", f"x{k}"], 2 * k if rate is None else rate, 9 + k)
    n = int(problem.id[1:])
    right = k < 1 + n % 3
    return "so we carry on, " * (1 + k) + f"\\boxed{{{int(problem.answer) + (0 if right else 1)}}}"


def build(folder: Path, ranks: Ranks, script=say, **values) -> Scripted:
    """A Scripted MASA on a folder's model."""
    s = settings(folder, **values)
    model = qwen.load(folder, torch.float32).requires_grad_(False)
    made = Scripted(model, Prompts(folder, s), load_problems(s.problems)[0], s, ranks)
    made.script = script
    with torch.no_grad():  # B is 0 at the start, and A would then have no gradient
        g = torch.Generator().manual_seed(3)
        for p in made.names.values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return made


class NoStep:
    """Stands for an optimiser: keeps the gradients it is asked to use."""

    def __init__(self, names):
        self.names, self.param_groups, self.grads = names, [{}], []

    def step(self):
        self.grads.append({name: p.grad.clone() for name, p in self.names.items()})

    def zero_grad(self, set_to_none=True):
        for p in self.names.values():
            p.grad = None


def gradient(folder: Path, ranks: Ranks, number: int, gate: bool, **values) -> tuple[dict, dict]:
    """(gradient, metrics) of one step; nothing is clipped."""
    first = build(folder, Ranks(0, 1, torch.device("cpu")), **values)
    odd = {g.problem.id for g in first.next_batch()[1::2]} if gate else set()
    made = build(folder, ranks, max_grad_norm=1e9, control_from=1, gate_std=0.1, **values)
    made.script = lambda problem, kind, k: say(problem, kind, k, 8 if problem.id in odd else None)
    made.optimizer = NoStep(made.names)
    row = made.step(number)
    return made.optimizer.grads[0], row


def main(argv: list[str]) -> int:
    """One job of the server, in a process of its own."""
    torch.set_num_threads(1)
    kind, *rest = argv
    if kind == "command":
        sys.stdout.flush()
        os.dup2(os.open(rest[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        sys.argv = ["masa", *rest[1:]]
        try:
            runpy.run_module("masa", run_name="__main__")
        except SystemExit as done:
            sys.stdout.flush()
            return done.code
    folder, out, number = Path(rest[0]), rest[1], int(rest[2])
    with process_group(2.0) as ranks:
        grads, row = gradient(folder, ranks, number, "--gate" in rest)
        save_file(grads, f"{out}-{ranks.rank}.safetensors")
        if ranks.rank == 0:
            write_json(f"{out}.json", row)
    return 0


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  the optimizer imports it at its first use
    import train_worker

    import masa.run  # noqa: F401

    train_worker.main = main
    train_worker.serve()
