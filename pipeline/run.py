"""One run: its settings, its model, this process among the ranks, where its files are, and how it samples.

`Run.sampler` gives what completes prompts as one variant does (the base model or a trained method); `Run.draw`
completes many prompts over all ranks and leaves a sample file. A completion is on disk as soon as it is finished, so a
run that is killed draws only the rest.
"""

import contextlib
import dataclasses
import functools
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import em
import lora
import sample
from common import hub
from common.errors import InputError, NumericsError
from common.files import Journal, atomic_write, each_row, write_jsonl
from common.model_config import ModelConfig
from common.ranks import Progress, Ranks
from common.template import ChatTemplate, fill, load_prompt
from common.tokens import (
    encode,
    encode_guarded,
    guarded,
    load_stop_ids,
    load_tokenizer,
    speller,
    token_offsets,
    unguarded,
    unused_ids,
)
from kernels.segment_logprob import default_impl
from llm import remote
from llm.client import Client, parse_endpoint
from model import Qwen3
from model import load as load_model
from pipeline.config import RET, RunConfig

Question = dict[str, Any]
Job = tuple[Question, str, int]  # a question, thinking "on" or "off", the number of the draw
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Generate = Callable[..., None]  # (prompts, seeds, max_new, how: sample.Sampling, finished(index, completion))


def too_long(flag: str, limit: int, tokens: int, what: str, room: int) -> str:
    """The sentence about a completion for which a model of `room` positions has none left, "" where it fits.

    flag, limit: the setting, such as "--max-new", and its value. tokens, what: of the prompt.
    """
    if tokens + limit <= room:
        return ""
    left = f"set {flag} to {room - tokens:,} or less" if tokens < room else "shorten the question or leave it out"
    told = f"{flag} {limit:,} and {what}, {tokens:,} tokens, exceed the model's {room:,} positions"
    return f"{told} (max_position_embeddings); {left}"


class Run:
    """What every stage of a run needs to know.

    ranks: `not_joined()` until the processes join; settable, since what can be refused without them is refused first.
    """

    def __init__(self, cfg: RunConfig, source: hub.Source, ranks: Ranks) -> None:
        self.cfg, self.source, self.ranks, self.out = cfg, source, ranks, Path(cfg.out)
        self.methods, self.variants, self.eval_sets = cfg.methods, cfg.variants, cfg.eval_paths
        self.tokenizer = load_tokenizer(source.folder)
        self.template = ChatTemplate(source.folder, cfg.system)
        self.template.check(self.tokenizer)
        self.control = self.template.control_tokens(self.tokenizer)
        self.user_turn = load_prompt(cfg.prompt)
        self.stop_ids = load_stop_ids(source.folder, self.tokenizer)
        self.key = ""  # of the stage under way: what it depends on (pipeline/reuse.py)
        self._sampler: tuple[str, Generate] | None = None  # the method of the last sampler, and it
        self.lent: Path | None = None  # samples of another run that the stage under way may use (pipeline/reuse.py)
        self.journals: list[Path] = []  # finished completions of the stage under way; kept until its receipt is there

    @property
    def impl(self) -> str:
        """Who computes log-probabilities: "torch" or "triton"."""
        return self.cfg.kernel or default_impl(self.ranks.device)

    @functools.cached_property
    def room(self) -> int:
        """Positions of the model: tokens of a prompt and its completion together."""
        return ModelConfig.from_json(self.source.folder / "config.json").max_position_embeddings

    def beside(self, source: hub.Source) -> "Run":
        """The same run with another base model, to ask it something; it shares the stage under way and its journals."""
        other = Run(self.cfg, source, self.ranks)
        other.methods, other.key, other.journals = [], self.key, self.journals
        return other

    # ---------- files

    def samples(self, name: str, variant: str) -> Path:
        """The samples of one variant on one evaluation set."""
        return self.out / "eval" / name / f"{variant}.jsonl"

    def file(self, name: str, variant: str, kind: str) -> Path:
        """A file about one variant on one evaluation set: kind "labels", "judged", "claims" or "feedback"."""
        return self.samples(name, variant).with_suffix(f".{kind}.jsonl")

    def adapter(self, method: str) -> Path:
        """The weights of a method's adapter."""
        return self.out / method / lora.WEIGHTS

    @property
    def prompt_path(self) -> Path:
        """The file of the user turn."""
        return Path(self.cfg.prompt)

    # ---------- prompts and models

    def turn(self, question: str) -> str:
        """What the user says: the question in its template."""
        return fill(self.user_turn, question=self.text(question))

    def text(self, text: str) -> str:
        """A text from outside for a place in a user turn: control tokens that it spells stay text."""
        return guarded(text, self.control)

    def prompt(self, turn: str, mode: str) -> str:
        """The rendered prompt of a user turn, thinking "on" or "off"."""
        return self.template.prompt(turn, thinking=mode == "on")

    def base_model(self, device: torch.device | None = None) -> Qwen3:
        """The base model, freshly loaded on `device` (None: this rank's), frozen."""
        return load_model(self.source.folder, DTYPES[self.cfg.dtype], device or self.ranks.device).requires_grad_(False)

    def adapter_of(self, variant: str) -> str:
        """The method whose adapter a variant uses, "" for the base model."""
        bare = variant.removesuffix(RET)
        return bare if bare in self.methods else ""

    def fit_matrix(self, observations: list[em.Observation]) -> em.Transitions:
        """P of some observations: by EM or by the frequency baseline, as set."""
        cfg = self.cfg
        if cfg.transitions == "frequency":
            return em.frequency(observations, prior=cfg.em_prior)
        return em.fit(observations, max_iter=cfg.em_iterations, damping=cfg.em_damping, prior=cfg.em_prior)

    # ---------- sampling

    @property
    def engine(self) -> str:
        """Who draws, as every sample row says it: this program with its dtype and device, or a server's model."""
        if self.cfg.backend == "openai":
            return f"openai {self.cfg.served_model or self.source.name}"
        small = " small batches" if self.cfg.small_batches and self.ranks.device.type == "cpu" else ""
        return f"local {self.cfg.dtype} {self.ranks.device.type}{small}"

    def _check_memory(self, total: int) -> None:
        """Raise InputError if a GPU of `total` bytes cannot hold the model and its longest completion."""
        longest = max(self.cfg.draw_max_new, self.cfg.max_new)
        config = ModelConfig.from_json(self.source.folder / "config.json")
        sample.check_memory(config, DTYPES[self.cfg.dtype], longest, total, "--max-new or --draw-max-new")

    def sampler(self, variant: str) -> Generate:
        """What completes prompts as `variant` does, by this program or by the server of --base-url.

        Variants that share an adapter follow each other, so the last one stays loaded.
        """
        method = self.adapter_of(variant)
        if self._sampler is None or self._sampler[0] != method:
            self._sampler = None  # its model goes before the next one comes
            self._sampler = method, self._server(method) if self.cfg.backend == "openai" else self._model(method)
        return self._sampler[1]

    def _model(self, method: str) -> Generate:
        cfg = self.cfg
        if self.ranks.device.type == "cuda":
            self._check_memory(torch.cuda.get_device_properties(self.ranks.device).total_memory)
        model = self.base_model()
        if method:
            lora.load(model, self.out / method)
            if cfg.dtype == "float32":  # faster; in bfloat16 it would round the adapter away
                lora.merge(model)
        never = unused_ids(self.tokenizer, model.config.vocab_size)

        def generate(prompts: Any, seeds: Any, max_new: list[int], how: sample.Sampling, finished: Any) -> None:
            common = {"stop_ids": self.stop_ids, "batch_size": cfg.sample_batch, "small_batches": cfg.small_batches}
            common |= {"never": never, "finished": finished}
            sample.generate(model, prompts, seeds, max_new=max_new, **dataclasses.asdict(how), **common)

        return generate

    def client(self, method: str) -> Client:
        """What asks the server of --base-url for the base model ("") or for the adapter of a method."""
        cfg = self.cfg
        name = method or cfg.served_model or self.source.name
        endpoint = parse_endpoint(f"{name}@{cfg.base_url}" + (f"#{cfg.key_env}" if cfg.key_env else ""))
        return Client(endpoint, concurrency=max(1, cfg.concurrency // self.ranks.world), limits=remote.PATIENCE)

    def _server(self, method: str) -> Generate:
        client = self.client(method)
        eos = ModelConfig.from_json(self.source.folder / "config.json").eos_token_id
        end_id, spell = eos if isinstance(eos, int) else eos[0], speller(self.tokenizer)

        def generate(prompts: Any, seeds: Any, max_new: list[int], how: sample.Sampling, finished: Any) -> None:
            to_ids = functools.partial(encode, self.tokenizer)
            known = set(self.tokenizer.get_vocab(with_added_tokens=True).values())
            stops = {"stop_ids": self.stop_ids, "end_id": end_id, "known": known, "spell": spell}
            again = remote.generate(
                client, to_ids, prompts, seeds, max_new=max_new, sampling=how, finished=finished, **stops
            )
            if again:
                self.ranks.log(f"{again} of {len(prompts)} completions came without ids and were encoded again")

        return generate

    def draw(
        self,
        generate: Generate,
        jobs: list[Job],
        path: Path,
        what: str,
        max_new: int,
        how: sample.Sampling,
        turn: Callable[[Question, int], str] | None = None,
        shorten: bool = False,
    ) -> float:
        """Sample every job and write one row each to `path`, in their order. Returns tokens a second of this rank.

        turn: (question, draw) -> what the user says; None: the question in its template. shorten: a completion may be
        shorter than max_new where the model has no more positions; else that is an InputError.
        The ranks share the jobs; the seed of a completion comes from its identity, so the file does not depend on how.
        """
        ranks, cfg = self.ranks, self.cfg
        mine = jobs[ranks.rank :: ranks.world]
        read: dict[str, tuple[str, array]] = {}  # half a million rows: equal prompts once, ids in four bytes
        prompts = []
        for q, mode, k in mine:
            text = self.prompt(turn(q, k) if turn else self.turn(q["question"]), mode)
            if text not in read:
                read[text] = unguarded(text), array("i", encode_guarded(self.tokenizer, text))
            prompts.append(read[text])
        seeds = [sample.seed_of(cfg.seed, q["id"], mode, k) for q, mode, k in mine]
        if mine and not shorten:  # prompts with search results or an earlier answer are known here only
            flag = "--draw-max-new" if what == "draws" else "--max-new"
            (_, ids), (q, _, _) = max(zip(prompts, mine, strict=True), key=lambda pair: len(pair[0][1]))
            if told := too_long(flag, max_new, len(ids), f"the prompt of question {q['id']}", self.room):
                raise InputError(f"{what}: {told}")
        journal_path = path.with_suffix(f".rank{ranks.rank}.jsonl")
        self.journals.append(journal_path)
        done: dict[int, tuple[array, str]] = {}  # ids and finish

        def take(row: Mapping[str, Any]) -> None:
            done[row["row"]] = array("i", row["ids"]), row["finish"]

        key = f"{self.key} {path} rank {ranks.rank} of {ranks.world}"
        journal = Journal(journal_path, key, use=take, keep=False)
        if done:
            ranks.log(f"{what}: {len(done)} of {len(mine)} were finished before")
        lent = self._lend(mine, [ids for _, ids in prompts], done)
        if lent:
            ranks.log(f"{what}: {len(lent)} of {len(mine)} lent by {self.lent}")
        left = [i for i in range(len(mine)) if i not in done]
        progress = Progress(ranks, len(left), what, "completions", parts="tokens")

        def finished(index: int, c: sample.Completion) -> None:
            row = {"row": left[index], "ids": c.ids, "finish": c.finish}
            journal.add(row)
            take(row)
            progress(1, len(c.ids))

        limits = [min(max_new, self.room - len(prompts[i][1])) if shorten else max_new for i in left]
        try:
            generate([prompts[i][1] for i in left], [seeds[i] for i in left], limits, how, finished)
        except NumericsError as error:
            (question, mode, k), method = mine[left[error.row]], self._sampler[0] if self._sampler else ""
            who = f"{self.source.name}{f' with the adapter {self.adapter(method)}' if method else ''}"
            where = f"question {question['id']}, thinking {mode}, draw {k}"
            raise NumericsError(
                f"{what}: the logits of {who} are not finite at {where}; look for NaN in its weights", error.row
            ) from None
        speed = progress.close()
        journal.close()

        def rows() -> Iterator[dict[str, Any]]:
            for i, ((q, mode, k), (prompt, prompt_ids)) in enumerate(zip(mine, prompts, strict=True)):
                ids, finish = done[i][0].tolist(), done[i][1]
                text, _ = token_offsets(self.tokenizer, ids[:-1] if finish == "stop" else ids)
                row = {"id": q["id"], "mode": mode, "draw": k, "question": q["question"], "answers": q["answers"]}
                row |= {"dataset": q["dataset"]} if "dataset" in q else {}
                row |= {"prompt": prompt, "prompt_ids": prompt_ids.tolist(), "ids": ids, "text": text, "finish": finish}
                model, engine = lent.get(i, (self.source.name, self.engine))
                yield row | {"model": model, "engine": engine}

        write_shares(ranks, path, rows(), len(jobs))
        return speed

    def _lend(
        self, mine: list[Job], prompts: Sequence[array], done: dict[int, tuple[array, str]]
    ) -> dict[int, tuple[str, str]]:
        """Put into `done` what the lent samples have of these jobs; returns index -> (model, engine) of those.

        Same question, prompt and number of the draw; settings and model are the other run's.
        """
        lent: dict[int, tuple[str, str]] = {}
        if self.lent:
            index = {(q["id"], mode, k): i for i, (q, mode, k) in enumerate(mine)}
            for row in each_row(self.lent):
                i = index.get((row["id"], row["mode"], row["draw"]))
                if i is not None and row["prompt_ids"] == prompts[i].tolist():
                    lent[i] = sys.intern(row["model"]), sys.intern(row["engine"])
                    done[i] = array("i", row["ids"]), row["finish"]
        return lent


def write_shares(ranks: Ranks, path: Path, rows: Iterable[dict[str, Any]], total: int) -> None:
    """Every rank's rows as one file in the jobs' order; rank r has rows r, r + world, r + 2 * world, ...

    Lines go from file to file: half a million samples are more than one process should hold.
    """
    share = path.with_suffix(f".share{ranks.rank}.jsonl")
    write_jsonl(share, rows)
    ranks.wait()
    if ranks.rank == 0:
        with contextlib.ExitStack() as stack:
            shares = [
                stack.enter_context(open(path.with_suffix(f".share{r}.jsonl"), encoding="utf-8", newline="\n"))
                for r in range(ranks.world)
            ]
            with atomic_write(path) as f:
                for i in range(total):
                    f.write(shares[i % ranks.world].readline())
    ranks.wait()
    share.unlink()
