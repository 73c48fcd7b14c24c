"""Sampling by a running engine: completions from an OpenAI-compatible server (vLLM, SGLang, llama.cpp).

The prompt goes out as the token ids our template and tokenizer made, so the server adds and renders nothing. vLLM sends
the ids it sampled back (`return_token_ids`), and those are kept; a server that answers with text only has its text
encoded again, which may split a word differently than it was sampled: such completions are counted and said.

Left out: starting a server. A finished adapter is asked for by the name under which the server serves it.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from common.errors import Refused, ServiceError
from common.ranks import Ranks
from llm.client import Client, Endpoint, Limits, in_threads, only_choice
from sample import Completion, Sampling

PATH = "/completions"
MORE = 16  # tokens of a text that is encoded again, beyond twice the limit, until it is too long
ADAPTER = "policy"  # what a server is told to call adapters under training, with a version behind it
# A server that samples is silent until a completion is finished.
PATIENCE = Limits(read=3600.0, exchange=3600.0, total=7200.0)


def logprobs(client: Client, prompt: list[int], completion: list[int]) -> list[float]:
    """What the server gives each token of a completion, nats. Raises ServiceError where it does not say.

    /completions with `echo` and `logprobs`, which vLLM and SGLang answer for prompts of token ids.
    """
    ids = prompt + completion
    body = {"model": client.endpoint.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True}
    given = only_choice(client.post(PATH, body | {"logprobs": 1}), str(client.endpoint)).get("logprobs")
    found = given.get("token_logprobs") if isinstance(given, dict) else None
    values = found[len(prompt) : len(ids)] if isinstance(found, list) else []
    if len(values) == len(completion) and all(map(_is_logprob, values)):
        return [float(value) for value in values]
    raise ServiceError(
        f"{client.endpoint}: the reply holds no log-probability for every token of the prompt; use a server that "
        "answers /completions with echo and logprobs, as vLLM and SGLang do"
    )


def _is_logprob(value: Any) -> bool:
    """Whether a value is the log-probability of a token that was sampled: finite, and 0 but for rounding at most."""
    return type(value) in (float, int) and -math.inf < value < 1e-3


def generate(
    client: Client,
    encode: Callable[[str], list[int]],
    prompts: Sequence[Sequence[int]],
    seeds: list[int],
    *,
    max_new: int | list[int],
    stop_ids: set[int],
    end_id: int,
    known: Container[int],
    spell: Callable[[Sequence[int], str], bool],
    sampling: Sampling,
    finished: Callable[[int, Completion], object],
    logprobs: bool = False,
) -> int:
    """Complete every prompt (token ids) and hand each completion to `finished(index, completion)` as it comes.

    encode: text to ids without special tokens added, for servers that send no ids. known: the ids that the tokenizer
    has. spell: whether ids spell a text (tokens.speller). end_id: the token that stands for "the model stopped" when
    the server does not say which one it was. logprobs: ask for the sampled tokens' too. Returns how many completions
    were encoded again. Raises ServiceError when the server refuses, fails for good or answers with something else than
    a completion of this model.
    """
    sampling.check()
    limits = [max_new] * len(prompts) if isinstance(max_new, int) else max_new
    assert len(prompts) == len(seeds) == len(limits), (len(prompts), len(seeds), len(limits))
    jobs = list(enumerate(zip(prompts, seeds, limits, strict=True)))

    def work(job: tuple[int, tuple[Sequence[int], int, int]]) -> tuple[Completion, bool]:
        _, (prompt, seed, limit) = job
        body = request(client.endpoint.model, prompt, seed, limit, stop_ids, sampling, logprobs)
        reply = client.post(PATH, body, tokens=len(prompt) + limit)
        done, again = completion(reply, encode, stop_ids, end_id, str(client.endpoint), logprobs)
        # The end token may come on top of them, and text that is encoded again may take a few tokens more.
        most = limit + (done.finish == "stop") + (limit + MORE) * again
        check_ids(done.ids, known, most, stop_ids if not again else (), str(client.endpoint))
        if not again:
            check_text(done.ids, reply["choices"][0].get("text"), spell, str(client.endpoint))
        return done, again

    encoded = 0
    for (index, _), (done, again) in in_threads(work, jobs, client.gate.most, client.stop):
        encoded += again
        finished(index, done)
    return encoded


def request(
    model: str,
    prompt: Sequence[int],
    seed: int,
    max_new: int,
    stop_ids: set[int],
    sampling: Sampling,
    logprobs: bool = False,
) -> dict[str, Any]:
    """The body of one request. Fields beyond OpenAI's own (top_k and what follows) are vLLM's and SGLang's."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_new,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
        "top_k": sampling.top_k or -1,  # -1 is off, in both
        "min_p": sampling.min_p,
        "stop_token_ids": sorted(stop_ids),
        "skip_special_tokens": False,  # else </think> may be missing from the text
        "return_token_ids": True,
    }
    return body | {"logprobs": 1} if logprobs else body  # beside those of the sampled tokens, the likeliest one's


def completion(
    reply: dict[str, Any],
    encode: Callable[[str], list[int]],
    stop_ids: set[int],
    end_id: int,
    where: str,
    logprobs: bool = False,
) -> tuple[Completion, bool]:
    """The Completion in a reply of /completions, and whether its text had to be encoded. Raises ServiceError.

    logprobs: the reply must hold those of its tokens; the end token that the server has not sent has None.
    """
    choice = only_choice(reply, where)
    finish, text, ids = (choice.get(name) for name in ("finish_reason", "text", "token_ids"))
    if finish not in ("stop", "length"):
        raise ServiceError(f"{where}: a completion ended with finish_reason {finish!r}, not stop or length; look there")
    if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
        again = False
    elif isinstance(text, str):
        ids, again = encode(text.encode("utf-8", "replace").decode()), True  # half a surrogate pair becomes "?"
    else:
        raise ServiceError(f"{where}: a completion holds neither token_ids nor text; is it a completions server?")
    given = _logprobs(choice, ids, again, where) if logprobs else None
    if finish == "stop" and (not ids or ids[-1] not in stop_ids):
        reason = choice.get("stop_reason")  # vLLM: the id that stopped it, null for its own end token
        ids = [*ids, reason if type(reason) is int and reason in stop_ids else end_id]
        given = given if given is None else [*given, None]
    return Completion(ids, finish, given), again


def check_ids(ids: Sequence[int], known: Container[int], most: int, ends: Container[int], where: str) -> None:
    """Raise ServiceError at ids that this model cannot have drawn: one without a token, or more than `most`.

    ends: tokens that end a completion, so that nothing can stand behind them.
    """
    if after := [i for i in ids[:-1] if i in ends]:
        raise ServiceError(
            f"{where}: a completion goes on after its end token {after[0]}; is it this model? look there"
        )
    if bad := [i for i in ids if i not in known]:
        raise ServiceError(
            f"{where}: a completion has the token {bad[0]}, which the tokenizer has not; is it this model?"
        )
    if len(ids) > most:
        raise ServiceError(f"{where}: a completion of {len(ids):,} tokens, {most:,} were asked for; look there")


def check_text(ids: Sequence[int], text: Any, spell: Callable[[Sequence[int], str], bool], where: str) -> None:
    """Raise ServiceError where a server's text is not what its ids spell. No text, or an empty one, says nothing."""
    if isinstance(text, str) and text and not spell(ids, text):
        raise ServiceError(
            f"{where}: the token ids of a completion do not spell its text, which begins {text[:40]!r}; is it this "
            "model, with the same tokenizer?"
        )


def _logprobs(choice: dict[str, Any], ids: list[int], again: bool, where: str) -> list[float | None]:
    """The log-probabilities of the ids that a server has sent."""
    found = choice["logprobs"].get("token_logprobs") if isinstance(choice.get("logprobs"), dict) else None
    numbers = isinstance(found, list) and all(map(_is_logprob, found))
    if again or not numbers or len(found) != len(ids):
        raise ServiceError(
            f"{where}: a completion without token_ids and one log-probability for each of them; use a server that "
            "gives both, as vLLM does, or go without the correction of its samples (--is-cap 0)"
        )
    return found


class Served:
    """A vLLM server that samples from an adapter under training: each `publish` gives it the newest one.

    The server runs with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and reads adapters from the same disk.
    """

    def __init__(self, base: Endpoint, concurrency: int, folder: Path, encode: Callable[[str], list[int]]) -> None:
        """base: the server and what it calls the base model. folder: where adapters are left for it to read."""
        self.base, self.concurrency, self.folder, self.encode = base, concurrency, folder.resolve(), encode
        self.name = base.model  # of the adapter that is served now

    def client(self) -> Client:
        """A client that asks for the newest adapter."""
        return Client(dataclasses.replace(self.base, model=self.name), self.concurrency, limits=PATIENCE)

    def publish(self, save: Callable[[Path], object], version: str, ranks: Ranks) -> None:
        """Let the server load what save(folder) writes, and forget the adapter before it. All ranks together.

        Raises ServiceError when the server refuses.
        """
        before, client = self.name, self.client()
        self.name = f"{ADAPTER}-{version}"
        if self.name == before:
            return
        if ranks.rank == 0:
            path = self.folder / self.name
            save(path)
            self._load(client, path)
            if before != self.base.model:
                client.post("/unload_lora_adapter", {"lora_name": before}, words=True)
                shutil.rmtree(self.folder / before)
        ranks.wait()

    def _load(self, client: Client, path: Path) -> None:
        """Load the newest adapter, in the place of one of that name which a run that was stopped has left there."""
        wanted = {"lora_name": self.name, "lora_path": str(path)}
        try:
            client.post("/load_lora_adapter", wanted, words=True)
        except Refused as refusal:
            try:
                client.post("/unload_lora_adapter", {"lora_name": self.name}, words=True)
            except Refused:  # no such leftover: the first refusal has the reason
                raise refusal from None
            client.post("/load_lora_adapter", wanted, words=True)

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        limits: list[int],
        progress: Callable[[int], object],
        **how: Any,
    ) -> list[Completion]:
        """What sample.generate does, by the server; `how` is passed on to `generate`."""
        done: dict[int, Completion] = {}

        def finished(index: int, completion: Completion) -> None:
            done[index] = completion
            progress(len(completion.ids))

        generate(self.client(), self.encode, prompts, seeds, max_new=limits, finished=finished, **how)
        return [done[k] for k in range(len(prompts))]
