"""A whole run: every step, checkpoints and resume, evaluations, results; and the command line.

python -m masa --model Qwen/Qwen3-8B-Base --problems data/deepscaler-train.jsonl --out runs/masa
torchrun --standalone --nproc_per_node=4 -m masa --preset v1-efficient ... --resume
python -m masa score --model Qwen/Qwen3-8B-Base --adapter runs/masa --eval-sets aime24=aime24.jsonl --out runs/aime
python -m masa samples --out runs/masa
python -m masa shapley --out runs/masa
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lora
import model as qwen
from common import checkpoint, hub, verifier
from common.endings import program, status
from common.errors import InputError, Stopped
from common.files import journal_rows, link_or_copy, read_jsonl, sha256_file, write_json, write_jsonl, write_sealed
from common.ranks import only_writer, process_group
from common.settings import cli
from common.template import load_prompt
from common.training import Training
from common.weights import weight_files
from masa import passk, samples
from masa.experts import Expert
from masa.problems import Problem, Prompts, load_problems
from masa.settings import PRESETS, Settings, check
from masa.step import Masa

EVALUATIONS, RESULTS = "evals.jsonl", "results.json"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def identity_of(s: Settings, source: hub.Source, evals: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit: everything that shapes the result.

    How many steps there are and when they are evaluated is free: a finished run is extended with a larger --steps.
    """
    free = {"micro_tokens", "gradient_checkpointing", "save_every", "kernel", "resume", "out", "sample_batch"}
    free |= {"steps", "epochs", "eval_every", "eval_sets", "samples_every", "samples_problems"}
    free |= {"base_url", "key_env", "concurrency", "problems", "model", "revision"}
    values = {k: v for k, v in asdict(s).items() if k not in free}
    values |= {name: load_prompt(values[name]) for name in ("solve_prompt", "meta_prompt", "eval_prompt")}
    weights = hashlib.sha256("".join(sha256_file(f) for f in weight_files(source.folder)).encode()).hexdigest()
    digests = {name: sha256_file(path) for name, path in evals.items()}
    values["verifier"] = verifier.judge_name()
    if s.reward:
        values["reward"] += f" {sha256_file(s.reward.rpartition(':')[0])}"
    if s.adapter:
        values["adapter"] = sha256_file(Path(s.adapter) / "adapter_model.safetensors")
    return checkpoint.identity_of(
        {"base": weights, "problems": sha256_file(s.problems), "eval_sets": digests, **values}
    )


class Run:
    """A run on disk: its training, evaluations, samples, results."""

    def __init__(
        self, s: Settings, source: hub.Source, masa: Masa, evals: dict[str, list[Problem]], identity: dict
    ) -> None:
        self.s, self.source, self.masa, self.evals = s, source, masa, evals
        self.out, self.ranks = Path(s.out), masa.ranks
        self.total = s.steps or math.ceil(s.epochs * len(masa.problems) / s.batch)
        self.evaluations: list[dict[str, Any]] = []
        self.training = Training(
            self.out,
            self.ranks,
            masa.names,
            masa.optimizer,
            identity,
            self.total,
            s.save_every,
            state=lambda: {"taken": masa.taken, "sampled": masa.sampled, "experts": masa.experts},
        )

    def begin(self, resume: bool) -> None:
        """Go on from the last checkpoint if asked to and there is one; else start at step 1.

        Raises InputError for a checkpoint that nobody asked to go on from, and for one beyond the last step.
        """
        if not resume:
            for old in checkpoint.found(self.out):
                raise InputError(f"{old}: another run's checkpoint; give --resume, or another --out")
        manifest = self.training.take_up()
        if manifest is None:
            self.training.start_anew(EVALUATIONS, RESULTS)
            return
        masa, done = self.masa, manifest["step"]
        if done > self.total:
            raise InputError(f"{self.out}: has {done} steps already; give --steps {done} or more, or another --out")
        masa.taken, masa.sampled = manifest["taken"], manifest["sampled"]
        masa.experts = [Expert(*fields) for fields in manifest["experts"]]
        self.evaluations = [row for row in self.saved_evaluations() if row["step"] <= done]

    def saved_evaluations(self) -> list[dict[str, Any]]:
        """The rows of evals.jsonl, without the last evaluation where one of its rows is damaged: it is made again.

        Raises InputError at a damaged row of an earlier one, whose weights are gone.
        """
        path = self.out / EVALUATIONS
        if not path.exists():
            return []
        with open(path, "rb") as f:
            rows = journal_rows(f, path)
        count = Counter((row["step"], row["set"]) for row in rows)
        short = {step for (step, name), n in count.items() if n != len(self.evals.get(name, ()))}
        if any(step < self.training.saved for step in short):
            raise InputError(f"{path}: rows of step {min(short)} are damaged; restore the file, or drop --resume")
        return [row for row in rows if row["step"] not in short]

    def evaluate(self, number: int) -> None:
        """All evaluation sets as they stand after `number` steps, unless that has been done."""
        for name, problems in self.evals.items():
            if any(row["step"] == number and row["set"] == name for row in self.evaluations):
                continue
            self.evaluations += self.masa.evaluate(number, name, problems)
            if self.ranks.rank == 0:
                write_sealed(self.out / EVALUATIONS, self.evaluations)
        self.ranks.wait()

    def train(self) -> None:
        """All steps that are left. Raises Stopped after the last finished step has been saved."""
        if self.ranks.rank == 0:
            checkpoint.check_space(self.out, self.masa.names)
        with self.training.stoppable():
            self.training.run(self.step, step_line, "training")
            self.evaluate(self.total)

    def step(self, number: int) -> dict[str, Any]:
        """One step, with the evaluation that is due before it; its metrics."""
        masa, every = self.masa, self.s.eval_every
        if number == 0 or (every and number % every == 0):
            self.evaluate(number)
        before = masa.taken, masa.sampled
        try:
            row = masa.step(number)
        except Stopped:  # raised while sampling, so no weight has changed
            masa.taken, masa.sampled = before
            raise
        self.keep_samples(number)
        return row

    def keep_samples(self, number: int) -> None:
        """A few problems of this step with all that was sampled for them, from rank 0."""
        every, groups = self.s.samples_every, self.masa.groups
        if every and number % every == 0 and self.ranks.rank == 0 and groups:
            path = self.out / "samples" / f"step-{number + 1:06d}.jsonl"
            write_jsonl(path, samples.sample_rows(groups, number + 1, self.s.samples_problems))

    def finish(self) -> None:
        """Leave the adapter or the model, and the results."""
        if self.ranks.rank == 0:
            if self.s.full:
                qwen.save(self.masa.model, self.out / "model")
                for file in (hub.member(self.source.folder, name) for name in BESIDE):
                    if file.exists():
                        link_or_copy(file.resolve(), self.out / "model" / file.name)
            else:
                lora.save(self.masa.model, self.out, self.source.name, self.source.commit)
        self.report(self.total)

    def score(self) -> None:
        """Evaluate only: the model as it is, with --adapter if one is given."""
        if self.ranks.rank == 0 and (self.out / checkpoint.METRICS).exists():
            raise InputError(f"{self.out}: holds a training; give score another --out")
        self.evaluate(0)
        self.report(0)

    def report(self, steps: int) -> None:
        """Leave results.json and print the table."""
        if self.ranks.rank == 0:
            results = passk.summaries(self.evaluations)
            facts = {"settings": asdict(self.s), "steps": steps, "sampled": self.masa.sampled, "evals": results}
            facts["verifier"] = verifier.judge_name()
            facts["seconds"] = round(sum(row["seconds"] for row in self.training.log), 1)
            write_json(self.out / RESULTS, facts)
            if results:
                print(passk.table(results))
        self.ranks.wait()


def step_line(m: Mapping[str, Any], total: int) -> str:
    """One step's metrics as a line for people."""
    named = {"acc": "accuracy", "parsed": "meta/parsed", "|p_hat-p|": "meta/error", "len": "meta/length"}
    named |= {"notion": "meta/notion", "gated": "share/gated", "cut": "share/cut", "grad": "grad_norm"}
    shown = " ".join(f"{name} {m[key]:.3f}" for name, key in named.items() if m[key] is not None)
    return f"step {m['step']}/{total} {shown} tokens {m['tokens']:,} ({m['seconds']:.1f} s)"


def work(s: Settings, source: hub.Source, command: str = "train") -> None:
    """Join the other processes, train or score, and leave what comes of it in `s.out`."""
    out = Path(s.out)
    with process_group() as ranks, only_writer(out, ranks), status(out), ranks.stop.listen():
        prompts = Prompts(source.folder, s)
        paths = dict(part.split("=", 1) for part in s.eval_sets.split(",") if part)
        evals = {name: load_problems(path, bool(s.reward))[0] for name, path in paths.items()}
        problems, unreadable = [p for part in evals.values() for p in part], 0
        if command == "train":
            problems, unreadable = load_problems(s.problems, bool(s.reward))
        ranks.log(f"{len(problems):,} problems, {unreadable:,} left out because their answer cannot be read")
        for name, ids in (("solution", prompts.solve("PROBLEM")), ("meta", prompts.meta("PROBLEM"))):
            ranks.log(f"prompt of a {name}: {prompts.tokenizer.decode(ids, skip_special_tokens=False)!r}")
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[s.dtype]
        net = qwen.load(source.folder, dtype, ranks.device).requires_grad_(False)
        masa = Masa(net, prompts, problems, s, ranks)
        ranks.log(f"{ranks.world} process(es) on {ranks.device.type}, log-probability op: {masa.impl}")
        if command == "score":
            Run(s, source, masa, evals, {}).score()
            return
        run = Run(s, source, masa, evals, identity_of(s, source, paths))
        run.begin(s.resume or ranks.restarted)
        run.train()
        run.finish()


@program
def main(argv: list[str] | None = None) -> None:
    """The command line. Returns the exit code, see common/endings.py."""

    def more(parser: Any) -> None:
        what = (
            "train (and evaluate before and after); score: evaluate only; samples: write samples.html of a run; "
            "shapley: what explains the gains of a finished run"
        )
        choices = ("train", "score", "samples", "shapley")
        parser.add_argument("command", nargs="?", default="train", choices=choices, help=what)

    s, rest = cli(Settings, argv, __doc__, more, PRESETS)
    if rest.command == "shapley":
        shares = passk.shapley_of(read_jsonl(Path(s.out) / "evals.jsonl"))
        for name, share in [*shares.items(), ("R2", sum(shares.values()))]:
            print(f"{name:<14}{share:8.4f}")
    elif rest.command == "samples":
        print(samples.write_page(Path(s.out)))
    else:
        check(s, rest.command)
        source = hub.locate(s.model, s.revision)
        work(s, source, rest.command)
