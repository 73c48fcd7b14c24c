"""Train the miniature from nothing: tokenizer, model, and the accuracy it starts with.

    python -m mini.build --world 0 --out mini/model
    python -m mini.build --hard --world 0 --warm mini/model --out mini/model-hard

A Qwen3 of about a million parameters learns from the documents of one world (world.py): short statements, questions
answered at once, questions answered after a thinking trace. Loss falls on what the model has to write, never on a
prompt: a model trained on its prompts learns to open every thought with the empty think block of a ThinkOff prompt.
Training stops while the model still errs: more steps remove the very mistakes that alignment is there to remove.

The folder is in Hugging Face's format. Same seed, same machine, same thread count: the same file.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import data
import model as qwen3
import sample
from common.endings import program
from common.files import atomic_write, read_jsonl, write_json
from common.model_config import MixtureConfig, ModelConfig
from common.tokens import encode, load_tokenizer
from mini.hard import HardWorld
from mini.world import World

HERE = Path(__file__).parent
VOCABULARY = 2560
SHAPE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)
# With --mixture every MLP becomes 8 experts of half its size, of which a token meets 2 (docs/moe.md).
MIXTURE = MixtureConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192, norm_topk_prob=True)
STEPS = 4000
BATCH_TOKENS = 2048
LEARNING_RATE = 3e-3
WARM_STEPS = 1400  # of a miniature that starts from another one
WARM_UP = 100  # steps
STATEMENTS = 6  # sentences in one statement document

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# One user turn, the start of the answer, and an empty thought where thinking is off (what Qwen3's template does).
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Qwen's split into words before merging: punctuation takes the line breaks after it along, so ".\n\n" can be a token.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prompt(question: str, thinking: bool) -> str:
    """The prompt text of a question, as the chat template of the finished tokenizer renders it."""
    tail = "" if thinking else "<think>\n\n</think>\n\n"
    return f"{TURN}user\n{question}{END_OF_TURN}\n{TURN}assistant\n{tail}"


def documents(world: World, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs of a world; a statement document has an empty prompt."""
    weights = [world.hidden[fact.id].exposure for fact in world.facts]
    kinds, shares = list(world.mix), list(world.mix.values())
    while True:
        facts = rng.choices(world.facts, weights, k=STATEMENTS)
        fact, kind = facts[0], rng.choices(kinds, shares)[0]
        if kind == "statements":
            yield "", " ".join(world.statement(rng, f) for f in facts) + END_OF_TEXT
        elif kind == "off":
            yield prompt(" ".join(world.question(rng, fact)), False), world.think_off(rng, fact) + END_OF_TURN
        else:
            opener, text = world.question(rng, fact)
            yield prompt(f"{opener} {text}", True), world.think_on(rng, fact, opener).completion + END_OF_TURN


def byte_bpe(texts: list[str], vocabulary: int, tags: list[str]) -> Tokenizer:
    """A byte-level BPE of `vocabulary` entries with Qwen's word split, its merges learnt from the texts.

    tags: texts that are one token each and take no part in the merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(tags),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
    )
    for tag in tags:
        texts = [text.replace(tag, "") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return tokenizer


def make_tokenizer(world: World) -> Tokenizer:
    """The tokenizer of a world's documents."""
    stream = documents(world, random.Random("tokenizer"))
    texts = ["".join(next(stream)) for _ in range(15000)]
    return byte_bpe(texts, VOCABULARY, ["<think>", "</think>", "<answer>", "</answer>"])


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json."""
    with atomic_write(out / "tokenizer.json") as f:
        f.write(tokenizer.to_str(pretty=False))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TURN,
            "pad_token": END_OF_TEXT,
            "bos_token": None,
            "unk_token": None,
            "model_max_length": SHAPE["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "eos_token_id": [tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)],
            "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        },
    )


def batches(world: World, tokenizer: Tokenizer, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless packed batches of a world's documents, see `packed`."""
    return packed(documents(world, random.Random(f"documents/{seed}")), tokenizer)


def packed(stream: Iterator[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of about BATCH_TOKENS tokens from an endless stream of (prompt, completion).

    Yields ids (N,), cu_seqlens (B+1,), and learn (N,) bool: True where the NEXT token belongs to a completion.
    """
    while True:
        ids, bounds, learn = [], [0], []
        while len(ids) < BATCH_TOKENS:
            texts = next(stream)
            head, tail = (e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False))
            ids += head + tail
            learn += [False] * max(len(head) - 1, 0) + [True] * (len(tail) - (not head)) + [False]
            bounds.append(len(ids))
        yield torch.tensor(ids), torch.tensor(bounds), torch.tensor(learn)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 5 %."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / (steps - WARM_UP)
    return LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(net: qwen3.Qwen3, stream: Iterator[tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
    """AdamW on next-token loss over completion tokens. A line of progress every 100 steps goes to stderr."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    start, seen, total = time.monotonic(), 0, 0.0
    for step in range(steps):
        ids, cu_seqlens, learn = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        at = learn.nonzero()[:, 0]
        loss = F.cross_entropy(net.logits(net(ids, cu_seqlens)[at]), ids[at + 1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen, total = seen + len(ids), total + loss.item()
        if (step + 1) % 100 == 0:
            speed = seen / (time.monotonic() - start)
            left = (steps - step - 1) * (time.monotonic() - start) / (step + 1)
            line = f"step {step + 1}/{steps}  loss {total / 100:.3f}  {speed:.0f} tokens/s  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            total = 0.0


def accuracy(net: qwen3.Qwen3, tokenizer: Tokenizer, questions: list[dict], seed: int = 0) -> dict[str, float]:
    """Acc and Mis with thinking, Acc without, in percent (T 0.6, top_p 0.95, top_k 20)."""
    stop = {tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)}
    result = {}
    for mode in ("on", "off"):
        prompts = [encode(tokenizer, prompt(q["question"], mode == "on")) for q in questions]
        seeds = [sample.seed_of(seed, q["id"], mode, 0) for q in questions]
        done = sample.generate(net, prompts, seeds, max_new=320, stop_ids=stop)
        hits = []
        for q, c in zip(questions, done, strict=True):
            text = tokenizer.decode([i for i in c.ids if i not in stop], skip_special_tokens=False)
            parsed = data.parse(text, thinking=mode == "on", finished=c.finish == "stop")
            hits.append(data.exact_match(parsed.thought, parsed.answer, q["answers"]))
        share = 100 / len(hits)
        if mode == "on":
            result["ThinkOn Acc"] = share * sum(t and a for t, a in hits)
            result["ThinkOn Mis"] = share * sum(t != a for t, a in hits)
        else:
            result["ThinkOff Acc"] = share * sum(a for _, a in hits)
    return result


def build(
    world: World, out: Path, steps: int, moe: MixtureConfig | None = None, warm: Path | None = None
) -> dict[str, float]:
    """Make, save and measure one miniature; returns its accuracy on the development questions.

    warm: a miniature whose tokenizer and weights this one starts from, instead of from nothing.
    """
    torch.manual_seed(world.seed)
    tokenizer = load_tokenizer(warm) if warm else make_tokenizer(world)
    write_tokenizer(tokenizer, out)
    shape = SHAPE | {"moe": moe, "model_type": "qwen3_moe" if moe else "qwen3"}
    config = ModelConfig(vocab_size=VOCABULARY, eos_token_id=tokenizer.token_to_id(END_OF_TURN), **shape)
    net = qwen3.load(warm, torch.float32) if warm else qwen3.Qwen3(config)
    size = sum(p.numel() for p in net.parameters())
    print(f"{size:,} parameters, {torch.get_num_threads()} threads", file=sys.stderr)
    train(net, batches(world, tokenizer, world.seed), steps)
    qwen3.save(net, out, torch.float16)
    net = qwen3.load(out)  # what is measured is what was written, rounded to 16 bits
    return accuracy(net, tokenizer, read_jsonl(HERE / "questions" / "dev.jsonl"))


@program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=0, help="seed of the world and of the training [0]")
    parser.add_argument("--null", action="store_true", help="the control world in which moves do not matter")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder to write [mini/model]")
    parser.add_argument("--steps", type=int, help=f"training steps [{STEPS}, warm {WARM_STEPS}]")
    parser.add_argument("--mixture", action="store_true", help="a mixture of experts, to try one (not shipped)")
    parser.add_argument("--hard", action="store_true", help="the world of pairs (hard.py)")
    parser.add_argument("--warm", type=Path, help="folder of a miniature to start from [from nothing]")
    args = parser.parse_args()
    start = time.monotonic()
    world = (HardWorld if args.hard else World)(args.world, args.null)
    steps = args.steps or (WARM_STEPS if args.warm else STEPS)
    result = build(world, args.out, steps, MIXTURE if args.mixture else None, args.warm)
    print(json.dumps({"seconds": round(time.monotonic() - start)} | {k: round(v, 1) for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(main())
