"""Prompts: the project's own templates with {places}, and a checkpoint's chat template rendered in a sandbox.

What transformers gives a chat template, and what becomes of it here:

  messages                              honoured; keys that are None are dropped, a thought under `reasoning_content`,
                                        `thinking` or `reasoning` is given under the first two names
  tools, documents                      None unless given, so "tools is not none" is false
  add_generation_prompt                 False unless given
  bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token
                                        honoured where tokenizer_config.json has them
  raise_exception, tojson, dict, namespace, loopcontrols, {% generation %}
                                        honoured; the tag is transparent
  strftime_now                          undefined: templates that ask for it then write a fixed date, and a prompt does
                                        not change overnight; one that insists on it is refused
  another NAME_token                    honoured, as image_token
  continue_final_message                left out, transformers cuts the text after rendering
  several templates                     `default` of a list in tokenizer_config.json, chat_template.jinja before it;
                                        `tool_use`, of that list or of additional_chat_templates/, where tools are given
  sanitize_control_tokens               `control_tokens` and tokens.encode_guarded do the same; chat_control_tokens of
                                        tokenizer_config.json is not read, what the template writes counts
"""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from common.errors import InputError
from common.files import find, read_json, read_text
from common.hub import member
from common.tokens import control_tokens, encode


def load_prompt(path: str | Path) -> str:
    """A prompt template, without the line end its file closes with. Raises InputError when it is missing.

    A relative path is looked up beside the project too, see `files.find`.
    """
    return read_text(find(path)).rstrip("\n")


def fill(template: str, **fields: str) -> str:
    """Put `fields` into the {places} of a prompt, in one pass: braces inside a field are text, not places.

    >>> fill("Q: {question}", question="what is {question}?")
    'Q: what is {question}?'

    Raises InputError when the template has a place without a field or lacks one.
    """
    places = set(re.findall(r"\{(\w+)\}", template))
    if odd := sorted(places ^ set(fields)):
        wanted = ", ".join(f"{{{name}}}" for name in sorted(fields))
        raise InputError(f"prompt: {{{odd[0]}}} does not fit; the template must hold exactly the places {wanted}")
    return re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], template)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja's own would escape <, > and & for HTML; arguments in the order of transformers'."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which trainers find the assistant's words: its content as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[Any]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a message's thought, the first the usual one


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: no key that is None, the thought under its usual names."""
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {"thinking": thought} | message | {"reasoning_content": thought}


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SPECIAL = re.compile(r"<[|｜][^<>\s]+?[|｜]>")  # how Qwen, Llama and DeepSeek write special tokens


class ChatTemplate:
    """A checkpoint's chat template, rendered in a sandbox. Only prompts go through it, never a completion."""

    def __init__(self, folder: str | Path, system: str = "") -> None:
        """Read chat_template.jinja, or the template in tokenizer_config.json. Raises InputError when there is none.

        system: a system turn for every prompt, "" for none; {thinking} in it becomes on or off.
        """
        config_path, own = member(folder, "tokenizer_config.json"), member(folder, "chat_template.jinja")
        config = read_json(config_path)
        self.system = system
        self.path = own if own.exists() else config_path
        named = _named(config.get("chat_template"))
        if own.exists():
            extra = member(Path(folder) / "additional_chat_templates", "tool_use.jinja")
            named = {"default": read_text(own)} | ({"tool_use": read_text(extra)} if extra.exists() else {})
        source = named.get("default")
        if not isinstance(source, str):
            raise InputError(f"{self.path}: no chat template in it; use an instruction-tuned checkpoint")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        tokens = {name: t for name, t in config.items() if name.endswith("_token")}
        tokens = {name: t.get("content") if isinstance(t, dict) else t for name, t in tokens.items()}
        self.source = source
        self.special = {name: t for name, t in tokens.items() if isinstance(t, str)}
        try:
            self.template = environment.from_string(source)
            self.with_tools = environment.from_string(named.get("tool_use") or source)
        except jinja2.TemplateError as error:
            raise InputError(f"{self.path}: the chat template does not parse ({error}); restore the file") from None

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """`messages` [{role, content, ...}] as one text. variables: tools, enable_thinking and what else the template
        asks for. Raises InputError when the template refuses them."""
        try:
            given = {"tools": None, "documents": None, "add_generation_prompt": False} | self.special | variables
            template = self.template if given["tools"] is None else self.with_tools
            return template.render(given, messages=[_message(message) for message in messages])
        except Exception as error:  # a template is a program from outside: it can fail in every way a program can
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: the chat template fails ({reason}); check the prompt") from None

    def prompt(self, text: str, thinking: bool) -> str:
        """One user turn up to where the completion starts.

        Thinking is switched by the template's enable_thinking (Qwen3) or by the system turn (Nemotron). A template
        without a switch gets the closed empty block of Qwen3 with thinking=False: where it opens the thought itself
        (R1-Distill) the thought is closed at once, else the block stands there whole (`by_hand` says which).
        """
        on, off = (self._turns(text, mode) for mode in (True, False))
        if thinking:
            return on
        # PAPER: does not say how R1-Distill, which always thinks, answers with thinking off.
        # HERE:  its thought is closed as soon as it is opened, by the template or here.
        # WHY:   the usual way, and the very block that Qwen3's own template writes.
        if opens_thought(off):
            return off.rstrip() + "\n\n</think>\n\n"
        return off + "<think>\n\n</think>\n\n" if on == off else off

    def by_hand(self) -> str:
        """What to tell about a template that cannot switch thinking off; "" for one that can."""
        on, off = (self._turns("Hello", mode) for mode in (True, False))
        if on != off:
            return ""
        return (
            f"{self.path}: the chat template cannot switch thinking off; ThinkOff closes the thought by hand (for a "
            "Nemotron model give --system 'detailed thinking {thinking}')"
        )

    def _turns(self, text: str, thinking: bool) -> str:
        turns = [{"role": "user", "content": text}]
        if self.system:
            system = self.system.replace("{thinking}", "on" if thinking else "off")
            turns.insert(0, {"role": "system", "content": system})
        return self.render(turns, add_generation_prompt=True, enable_thinking=thinking)

    def control_tokens(self, tokenizer: Tokenizer) -> re.Pattern[str]:
        """What `tokens.guarded` keeps from being read as tokens in questions, search results and other text."""
        return control_tokens(tokenizer, self.source, TAGS)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise InputError unless each special token of the prompts, and the end of a turn, is one token."""
        marks = {*SPECIAL.findall(self.prompt("Hello", True))}
        if "eos_token" in self.special:
            marks.add(self.special["eos_token"])
        odd = sorted(mark for mark in marks if len(encode(tokenizer, mark)) != 1)
        if odd:
            raise InputError(
                f"{self.path}: {', '.join(odd)} is not one token of tokenizer.json; take both files from one checkpoint"
            )


def _named(found: Any) -> dict[str, Any]:
    """The templates of tokenizer_config.json by name: one alone is the default, several are [{name, template}]."""
    if isinstance(found, list):
        return {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    return {"default": found}


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends in <think>, so that the completion starts inside the thought."""
    return prompt.rstrip().endswith(TAGS[0])
