"""What a row of another trainer means: the ids that TRL's KTOTrainer makes of it, or one line that says why not.

  {prompt, completion, label}           texts, or lists of messages that the chat template renders
  {prompt, chosen, rejected}            the same in pairs: two rows, chosen first
  {chosen, rejected}                    the prompt is what the two begin with in common
  tools, chat_template_kwargs           given to the template; tools also as a JSON text
  system, tool and earlier turns, tool_calls, reasoning_content, thinking, content in text parts
                                        as the chat template writes them
  an NFD text                           in the tokenizer's normal form: the ids are those of the text as it was

Refused, each with its reason: a row without label, completion or prompt; texts mixed with messages; {text} and
{messages}, which say neither where the completion starts nor its class; {conversations} (from-llamafactory reads them);
images, videos and audios; a template that renders the prompt alone differently from the prompt in the conversation,
where TRL trains on a context that its model never sees; whatever the template itself refuses.

Where a row gives other ids here than there:
  PAPER: TRL writes the end token a second time after a text that a chat template has closed with it and a line end, and
         after a message that ends in it; and a start token before a text that begins with it, where tokenizers add one.
  HERE:  once.
  WHY:   such a row is a rendered message, and TRL gives the message itself one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

import data
from common.errors import InputError
from common.template import TAGS, THOUGHTS, ChatTemplate
from common.tokens import encode, load_tokenizer, token_offsets

Row = dict[str, Any]
Messages = list[Row]
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
SAID = ("content", "tool_calls", "function_call", *THOUGHTS)  # of which a completion needs one
# Arguments of transformers' apply_chat_template, which would not reach the template as variables.
NOT_VARIABLES = ("add_generation_prompt", "continue_final_message", "chat_template", "tokenize", "messages")
NOT_VARIABLES += ("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs")
NOT_VARIABLES += ("return_assistant_tokens_mask", "sanitize_control_tokens")


@dataclass(frozen=True)
class Exchange:
    """One prompt, one completion, and what the template is told. suffix: of the row's id, where a row makes two."""

    prompt: str | Messages
    completion: str | Messages
    label: bool
    variables: dict[str, Any]
    suffix: str = ""


def exchanges(row: Any) -> Iterator[Exchange]:
    """The exchanges of one row: one, or two of a pair. Raises InputError with the reason when it is not such a row."""
    if not isinstance(row, dict):
        raise InputError("is not an object")
    if found := [name for name in MEDIA if row.get(name)]:
        raise InputError(f"field {found[0]!r} needs a model that sees or hears; leave such rows out")
    variables = _variables(row)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        prompt, chosen, rejected = _pair(row)
        yield Exchange(prompt, chosen, True, variables, "#chosen")
        yield Exchange(prompt, rejected, False, variables, "#rejected")
        return
    for name in ("prompt", "completion", "label"):
        if row.get(name) is None:
            raise InputError(_missing(row, name))
    prompt, completion = (_turns(row[name], name) for name in ("prompt", "completion"))
    _same_kind(prompt=prompt, completion=completion)
    yield Exchange(prompt, completion, as_label(row["label"], "label"), variables)


def _missing(row: Row, name: str) -> str:
    """Why a row without this field is of no use."""
    if isinstance(row.get("conversations"), list):
        return "field 'conversations' is LLaMA-Factory's way; use from-llamafactory"
    for other in ("messages", "text"):
        if other in row and name == "prompt":
            return f"field {other!r} does not say where the completion starts; give prompt, completion and label"
    said = "true for an answer to learn, false for one to avoid" if name == "label" else "a text or messages"
    return f"field {name!r} is missing ({said})"


def as_label(value: Any, what: str) -> bool:
    """A class. Raises InputError at anything but true and false."""
    if not isinstance(value, bool):
        raise InputError(f"field {what!r} must be true or false, not {value!r}")
    return value


def _variables(row: Row) -> dict[str, Any]:
    """tools and chat_template_kwargs of a row, as the template gets them."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"field 'tools' is not JSON ({error})") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError("field 'tools' must be a list of JSON schemas, or that list as a JSON text")
    if not isinstance(more, dict):
        raise InputError("field 'chat_template_kwargs' must be an object")
    if odd := sorted(more.keys() & {*NOT_VARIABLES}):
        raise InputError(f"field 'chat_template_kwargs': {odd[0]!r} is not a variable of a template; leave it out")
    return {"tools": tools} | more


def _turns(value: Any, name: str) -> str | Messages:
    """A field that is a text or a list of messages. Raises InputError at anything else."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"an empty {name}; drop the row")
        return value
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"field {name!r} must be a text or a list of messages")
    if not value:
        raise InputError(f"an empty {name}; drop the row")
    for turn in value:
        if not isinstance(turn.get("role"), str):
            raise InputError(f"field {name!r}: a message without a role; roles are system, user, assistant and tool")
        for medium in MEDIA:
            if turn.get(medium):
                raise InputError(f"field {name!r}: {medium!r} needs a model that sees or hears; leave such rows out")
        _check_content(turn.get("content"), turn["role"], name)
    if name != "prompt" and not any(turn.get(field) for turn in value for field in SAID):
        raise InputError(f"an empty {name}; drop the row")
    return value


def _check_content(content: Any, role: str, name: str) -> None:
    if content is None or isinstance(content, str):
        empty = isinstance(content, str) and not content.strip()
        if empty and role == "user":
            raise InputError(f"an empty {name}; drop the row")
        return
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InputError(f"field {name!r}: the content of a message must be a text or a list of text parts")
    kinds = [
        part.get("type") for part in content if part.get("type") != "text" or not isinstance(part.get("text"), str)
    ]
    if kinds:
        raise InputError(f"field {name!r}: a part of type {kinds[0]!r}; parts must be of type text")


def _same_kind(**fields: str | Messages) -> None:
    if len({isinstance(value, str) for value in fields.values()}) > 1:
        names = " and ".join(repr(name) for name in fields)
        raise InputError(f"fields {names} must all be texts or all be messages")


def _pair(row: Row) -> tuple[str | Messages, str | Messages, str | Messages]:
    """(prompt, chosen, rejected) of a pair, with TRL's rule for a prompt that stands in both."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise InputError(f"field {name!r} is missing; a pair has chosen and rejected")
    chosen, rejected = (_turns(row[name], name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise InputError("fields 'chosen' and 'rejected' are the same; drop the row")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "prompt")
        _same_kind(prompt=prompt, chosen=chosen, rejected=rejected)
        return prompt, chosen, rejected
    _same_kind(chosen=chosen, rejected=rejected)
    shorter = min(len(chosen), len(rejected))
    common = next((k for k in range(shorter) if chosen[k] != rejected[k]), shorter - 1)
    if common and chosen[common - 1] == " ":  # the blank before a word belongs to it
        common -= 1
    if not common:
        raise InputError("fields 'chosen' and 'rejected' begin with nothing in common; give the prompt its own field")
    return chosen[:common], chosen[common:], rejected[common:]


@dataclass(frozen=True)
class Chat:
    """The tokenizer and chat template of one checkpoint."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def of(cls, model: str) -> "Chat":
        """From a checkpoint's folder. Raises InputError when it is not one."""
        if not model:
            raise InputError("--model is needed here: the folder of the checkpoint the rows belong to")
        return cls(load_tokenizer(model), ChatTemplate(model))

    @property
    def end(self) -> str:
        """The end token. Raises InputError when the checkpoint names none."""
        end = self.template.special.get("eos_token", "")
        if not end:
            raise InputError(f"{self.template.path}: no eos_token in it; rows need the token that ends a completion")
        return end

    def user_turn(self, prompt: str) -> str:
        """What the user said in a rendered prompt. Raises InputError when this template did not render it."""
        before, _, after = self.template.prompt("\x00", True).partition("\x00")
        if not (prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before + after)):
            raise InputError(f"prompt {prompt[:60]!r} is not one user turn of this chat template; give its own --model")
        return prompt[len(before) : len(prompt) - len(after)]

    def ids(self, exchange: Exchange) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids) of an exchange, TRL's. Raises InputError when the template cannot do it.

        TRL tokenises the prompt, and the prompt with the completion; the completion starts where the two differ. So no
        token is cut at the border: "The sky is " and "blue" are "The sky is" and " blue".
        """
        if isinstance(exchange.prompt, str):
            prompt, whole = exchange.prompt, exchange.prompt + exchange.completion
            if not whole.rstrip("\n").endswith(self.end):
                whole += self.end
            alone, both = (self._with_special_tokens(text) for text in (prompt, whole))
        else:
            prompt, whole = self._rendered(exchange)
            alone, both = (encode(self.tokenizer, text) for text in (prompt, whole))
        pairs = enumerate(zip(alone, both, strict=False))
        start = next((k for k, (a, b) in pairs if a != b), min(len(alone), len(both)))
        if not start or start == len(both):
            raise InputError(f"an empty {'completion' if start else 'prompt'}; drop the row")
        return both[:start], both[start:]

    def _with_special_tokens(self, text: str) -> list[int]:
        """Ids of a text with what the tokenizer puts in front of it, which TRL has for texts and not for messages."""
        ids = self.tokenizer.encode(text, add_special_tokens=True).ids
        start = self.template.special.get("bos_token", "")
        twice = start and text.startswith(start) and ids[:2] == [self.tokenizer.token_to_id(start)] * 2
        return ids[1:] if twice else ids

    def _rendered(self, exchange: Exchange) -> tuple[str, str]:
        """The prompt, and the prompt with the completion, as the chat template writes them."""
        said, answered, variables = exchange.prompt, exchange.completion, exchange.variables
        assert not isinstance(said, str) and not isinstance(answered, str), exchange
        last = answered[-1]
        if isinstance(last.get("content"), str):
            answered = [*answered[:-1], last | {"content": last["content"].removesuffix(self.end)}]
        try:
            whole = self.template.render([*said, *answered], **variables)
            prompt = self.template.render(said, **{"add_generation_prompt": True} | variables)
        except InputError as error:
            parts = any(isinstance(turn.get("content"), list) for turn in [*said, *answered])
            hint = "; it may take no content in parts: join their texts" if parts else ""
            raise InputError(f"{str(error).removesuffix('; check the prompt')}{hint}") from None
        if not whole.startswith(prompt):
            raise InputError("the chat template does not repeat the prompt before the answer; render the row yourself")
        return prompt, whole

    def row(self, name: str, exchange: Exchange, sentences: list[str] | None = None) -> Row:
        """One train.jsonl row with w = 1. sentences: its steps, in order; None: the segments of its thought.

        The texts are those of the ids. The completion's ends before the end token, its ids after all that the template
        writes: Qwen3's write a line end there, and TRL trains on it.
        """
        prompt_ids, completion_ids = self.ids(exchange)
        prompt, completion = (token_offsets(self.tokenizer, ids)[0] for ids in (prompt_ids, completion_ids))
        at = completion.rfind(self.end)
        if at >= 0 and not completion[at + len(self.end) :].strip():
            completion = completion[:at]
        if not prompt.strip() or not completion:
            raise InputError(f"an empty {'completion' if prompt.strip() else 'prompt'}; drop the row")
        if sentences is None:
            thought = data.parse(completion).span if TAGS[1] in completion else None
            spans = [list(s) for s in data.split_segments(completion, *thought)] if thought else []
        else:
            spans = _found(sentences, completion)
        row = {"id": name + exchange.suffix, "prompt": prompt, "completion": completion, "label": exchange.label}
        row |= {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "spans": spans}
        return row | {"labels": [[] for _ in spans], "w": [1.0] * len(spans)}


def _found(sentences: list[str], completion: str) -> list[list[int]]:
    """Where the sentences stand, one after the other. Raises InputError at one that is not there."""
    spans: list[list[int]] = []
    position = 0
    for sentence in sentences:
        start = completion.find(sentence, position)
        if start < 0 or not sentence:
            raise InputError(f"sentence {sentence[:60]!r} is not in the completion after the one before it")
        position = start + len(sentence)
        spans.append([start, position])
    return spans
