"""Sampling by a running engine: completions from an OpenAI-compatible server (vLLM, SGLang, llama.cpp).

The prompt goes out as the token ids our template and tokenizer made, so the server adds and renders nothing. vLLM sends
the ids it sampled back (`return_token_ids`), and those are kept; a server that answers with text only has its text
encoded again, which may split a word differently than it was sampled: such completions are counted and said.

Left out: starting a server, loading an adapter into one (give the name under which the server serves it as the model).
"""

from collections.abc import Callable
from typing import Any

from client import Client, ServiceError, in_threads
from sample import Completion, Sampling

PATH = "/completions"


def generate(
    client: Client,
    encode: Callable[[str], list[int]],
    prompts: list[list[int]],
    seeds: list[int],
    *,
    max_new: int,
    stop_ids: set[int],
    end_id: int,
    sampling: Sampling,
    finished: Callable[[int, Completion], object],
) -> int:
    """Complete every prompt (token ids) and hand each completion to `finished(index, completion)` as it comes.

    encode: text to ids without special tokens added, for servers that send no ids. end_id: the token that stands for
    "the model stopped" when the server does not say which one it was. Returns how many completions were encoded again.
    Raises ServiceError when the server refuses, fails for good or answers with something else than a completion.
    """
    sampling.check()
    assert len(prompts) == len(seeds), (len(prompts), len(seeds))
    jobs = list(enumerate(zip(prompts, seeds, strict=True)))

    def work(job: tuple[int, tuple[list[int], int]]) -> tuple[Completion, bool]:
        _, (prompt, seed) = job
        body = request(client.endpoint.model, prompt, seed, max_new, stop_ids, sampling)
        reply = client.post(PATH, body, tokens=len(prompt) + max_new)
        return completion(reply, encode, stop_ids, end_id, str(client.endpoint))

    encoded = 0
    for (index, _), (done, again) in in_threads(work, jobs, client.gate.most, client.stop):
        encoded += again
        finished(index, done)
    return encoded


def request(
    model: str, prompt: list[int], seed: int, max_new: int, stop_ids: set[int], sampling: Sampling
) -> dict[str, Any]:
    """The body of one request. Fields beyond OpenAI's own (top_k and what follows) are vLLM's and SGLang's."""
    return {
        "model": model,
        "prompt": prompt,
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


def completion(
    reply: dict[str, Any], encode: Callable[[str], list[int]], stop_ids: set[int], end_id: int, where: str
) -> tuple[Completion, bool]:
    """The Completion in a reply of /completions, and whether its text had to be encoded. Raises ServiceError."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    finish, text, ids = (choice.get(name) for name in ("finish_reason", "text", "token_ids"))
    if finish not in ("stop", "length"):
        raise ServiceError(f"{where}: a completion ended with finish_reason {finish!r}, not stop or length; look there")
    if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
        again = False
    elif isinstance(text, str):
        ids, again = encode(text), True
    else:
        raise ServiceError(f"{where}: a completion holds neither token_ids nor text; is it a completions server?")
    if finish == "stop" and (not ids or ids[-1] not in stop_ids):
        reason = choice.get("stop_reason")  # vLLM: the id that stopped it, null for its own end token
        ids = [*ids, reason if reason in stop_ids else end_id]
    return Completion(ids, finish), again
