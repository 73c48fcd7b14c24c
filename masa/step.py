"""One step of MASA (Algorithm 1): sample, grade, score, gate and cut, update, clone experts.

    problems -> metas -> gate, cutoff, hint -> solutions -> verifier -> Outcome -> rewards -> advantages
             -> one update per step -> metas with their numbers corrected (experts) -> behaviour cloning

A problem's solutions and metas stay on one rank, so groups need no communication; gradients are summed by hand and not
by DDP, because gating leaves ranks with unequal work or none. The loss is divided by the tokens of all ranks: it
depends neither on the packing nor on the number of ranks.
"""

import math
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data
import lora
import model as qwen
import sample
from common import verifier
from common.errors import InputError, NumericsError
from common.ranks import Progress, Ranks
from common.tokens import speller, unused_ids
from common.training import memory_named, peak_memory
from kernels.segment_logprob import default_impl
from llm import remote
from llm.client import Endpoint
from masa import own_reward
from masa.control import cut_at, hint_of, is_gated
from masa.experts import Expert, expert_of, expert_weights
from masa.metrics import Tally, count_group
from masa.objective import advantages, kl_to_reference, policy_loss, server_weights, token_logp
from masa.own_reward import RIGHT, Reward
from masa.problems import Problem, Prompts, parse_meta
from masa.rewards import Outcome, overlong_penalty, reward_meta
from masa.rollouts import Group, Job, Rollout
from masa.settings import Settings


def grade_solutions(
    solutions: list[Rollout], problem: Problem, lenient: bool, own: Reward | None = None
) -> tuple[Outcome, list[float]]:
    """The verifier's word on each solution, and r_sol; one that was cut off is judged as it stands.

    own: a reward function that judges in the verifier's place.
    """
    if own is not None:
        rewards = [own(problem.text, problem.answer, r.text) for r in solutions]
        grades = [verifier.Grade(reward >= RIGHT, True) for reward in rewards]
    else:
        grades = [verifier.grade(r.text, problem.answer, lenient) for r in solutions]
        rewards = [float(g.correct) for g in grades]  # correctness alone: no reward for the format
    correct, answered = tuple(g.correct for g in grades), tuple(g.found for g in grades)
    lengths, texts = tuple(len(r.ids) for r in solutions), tuple(r.text for r in solutions)
    return Outcome(correct, answered, lengths, texts, sum(g.failed for g in grades)), rewards


def set_advantages(rollouts: list[Rollout]) -> None:
    """Advantages within one group of rollouts."""
    for r, a in zip(rollouts, advantages([r.reward for r in rollouts]) if rollouts else [], strict=True):
        r.advantage = a


class Masa:
    """The policy, its problems, and all that lasts from step to step."""

    def __init__(self, model: qwen.Qwen3, prompts: Prompts, problems: list[Problem], s: Settings, ranks: Ranks) -> None:
        self.model, self.prompts, self.s, self.ranks = model, prompts, s, ranks
        self.impl = s.kernel or default_impl(ranks.device)
        self.lr = s.lr or (1e-6 if s.full else 1e-5)  # LoRA needs about ten times the rate of all weights
        self.own_reward = own_reward.load(s.reward) if s.reward else None
        if s.full:
            model.requires_grad_(True)
        elif s.adapter:
            lora.load(model, s.adapter)
        else:
            lora.add(model, s.lora_r, s.lora_alpha, seed=s.seed)
        model.recompute = "full" if s.gradient_checkpointing else "none"
        self.names = dict(model.named_parameters()) if s.full else lora.state(model)
        self.optimizer = torch.optim.AdamW(
            self.names.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay
        )
        self.problems = self.short_enough(problems)
        self.taken = self.sampled = 0  # problems taken from the stream, tokens sampled, by all ranks
        self.experts: list[Expert] = []
        self.groups: list[Group] = []  # of the last step, on this rank
        self.server = None
        if s.base_url:
            base = Endpoint(s.model, s.base_url, s.key_env)
            share = max(1, s.concurrency // ranks.world)
            self.server = remote.Served(base, share, Path(s.out) / "served", prompts.encode)

    def short_enough(self, problems: list[Problem]) -> list[Problem]:
        """The problems with short enough prompts. Raises InputError when there are none or the model has no room."""
        s, room = self.s, self.model.config.max_position_embeddings
        longest = {p.id: max(len(self.prompts.solve(p.text)), len(self.prompts.meta(p.text))) for p in problems}
        kept = [p for p in problems if longest[p.id] <= s.max_prompt]
        if not kept:
            raise InputError(
                f"no problem's prompts fit into {s.max_prompt} tokens (the shortest has {min(longest.values())}); "
                "raise --max-prompt"
            )
        need = max(longest[p.id] for p in kept) + s.max_new
        if need > room:
            raise InputError(f"prompts and --max-new need {need} positions, the model has {room}; lower --max-new")
        self.ranks.log(f"{len(kept):,} problems, {len(problems) - len(kept):,} left out beyond {s.max_prompt} tokens")
        return kept

    # -- sampling

    def complete(self, jobs: list[Job], temperature: float, what: str, trained: bool = True) -> list[Rollout]:
        """Sample every job of this rank: here, or at the server. trained: not only to be evaluated."""
        progress = Progress(self.ranks, None, what, "tokens")
        how = sample.Sampling(temperature, top_p=1.0, top_k=0)  # a cut distribution would bias the ratios
        prompts, seeds, limits = [j.prompt_ids for j in jobs], [j.seed for j in jobs], [j.limit for j in jobs]
        common: dict[str, Any] = {"stop_ids": self.prompts.stop_ids, "progress": progress}
        self.ranks.check_stop()
        if self.server is None:
            never = unused_ids(self.prompts.tokenizer, self.model.config.vocab_size)
            common |= {"batch_size": self.s.sample_batch, "never": never, **asdict(how)}
            done = sample.generate(self.model, prompts, seeds, max_new=limits, **common)
        else:
            known = set(self.prompts.tokenizer.get_vocab(with_added_tokens=True).values())
            common |= {"spell": speller(self.prompts.tokenizer)}
            common |= {"end_id": self.prompts.end, "known": known, "logprobs": trained and self.s.is_cap > 0}
            done = self.server.generate(prompts, seeds, limits, sampling=how, **common)
        if time.perf_counter() - progress.started > 10:
            progress.close()
        texts = [self.prompts.text(c.ids) for c in done]
        return [
            Rollout(job.prompt_ids, c.ids, text, c.finish == "length", job.limit, served=c.logprobs)
            for job, c, text in zip(jobs, done, texts, strict=True)
        ]

    def publish(self, number: int) -> None:
        """Give the policy as it stands after `number` steps to the server, if one samples."""
        if self.server is not None:
            save = partial(lora.save, self.model, base_name=self.s.model, revision=self.s.revision)
            self.server.publish(save, str(number), self.ranks)

    def jobs(self, problem: Problem, kind: str, when: str, n: int, limit: int, hints: Sequence = ()) -> list[Job]:
        """n completions of one kind, "meta", "solution" or "evaluation", of a problem. when: part of their seeds."""
        make = {"meta": self.prompts.meta, "solution": self.prompts.solve, "evaluation": self.prompts.evaluation}[kind]
        seeds = [sample.seed_of(self.s.seed, f"{when}/{problem.id}", kind, k) for k in range(n)]
        plain = make(problem.text)
        out = []
        for k, seed in enumerate(seeds):
            ids = self.prompts.solve(problem.text, hints[k]) if hints and hints[k] else plain
            out.append(Job(ids if len(ids) <= self.s.max_prompt else plain, seed, limit))
        return out

    def next_batch(self, n: int | None = None, first_place: int = 0) -> list[Group]:
        """This rank's share of the next n (else `batch`) problems of the stream, each epoch in its own seeded order."""
        s, total, groups = self.s, len(self.problems), []
        n = s.batch if n is None else n
        for k in range(n):
            epoch, at = divmod(self.taken + k, total)
            order = torch.randperm(total, generator=torch.Generator().manual_seed(s.seed * 1000 + epoch))
            groups.append(Group(first_place + k, self.problems[int(order[at])]))
        self.taken += n
        return groups[self.ranks.rank :: self.ranks.world]

    def controlled(self, number: int) -> bool:
        """Whether metas come first in this step and decide what is sampled."""
        return bool(self.s.control_from and number >= self.s.control_from and self.s.metas)

    def roll_out(self, groups: list[Group], number: int, when: str) -> None:
        """Sample metas and solutions of the groups: in one go, or metas first once they are in control."""
        s = self.s
        # Seeds hold the place: the same problem twice in a batch gets its own samples.
        metas = [self.jobs(g.problem, "meta", f"{when}.{g.place}", s.metas, s.max_new) for g in groups]
        if not self.controlled(number):
            solutions = [self.jobs(g.problem, "solution", f"{when}.{g.place}", s.solutions, s.max_new) for g in groups]
            done = self.complete([j for part in metas + solutions for j in part], s.temperature, "rollouts")
            split = len(groups) * s.metas
            self.assign(groups, done[:split], done[split:])
            return
        self.assign(groups, self.complete([j for part in metas for j in part], s.temperature, "metas"), [])
        for g in groups:
            g.gated = is_gated(g.predictions, s.gate_std, s.gate_margin)
            draw = random.Random(sample.seed_of(s.seed, f"{when}.{g.place}/{g.problem.id}", "probe", 0)).random()
            g.probe = g.gated and draw < s.gate_probe
        self.sample_controlled([g for g in groups if not g.gated or g.probe], when)

    def sample_controlled(self, groups: list[Group], when: str) -> None:
        """Sample the groups' solutions with the cutoff and the hints of their metas."""
        s, solutions = self.s, []
        for g in groups:
            seeds = [sample.seed_of(s.seed, f"{when}.{g.place}", "hint", k) for k in range(s.solutions)]
            hints = [hint_of(g.predictions, seed) for seed in seeds] if s.hint else ()
            limit = cut_at(g.predictions, s.cutoff, s.max_new)
            solutions += self.jobs(g.problem, "solution", f"{when}.{g.place}", s.solutions, limit, hints)
        self.assign(groups, [], self.complete(solutions, s.temperature, "solutions"))

    def assign(self, groups: list[Group], metas: list[Rollout], solutions: list[Rollout]) -> None:
        """Give each group its rollouts, which come one group after the other, and parse the metas."""
        for k, g in enumerate(groups):
            if metas:
                n = len(metas) // len(groups)
                g.metas = metas[k * n : (k + 1) * n]
                g.predictions = [parse_meta(r.text) for r in g.metas]
            if solutions:
                n = len(solutions) // len(groups)
                g.solutions = solutions[k * n : (k + 1) * n]

    # -- rewards

    def score(self, groups: list[Group]) -> None:
        """Rewards and advantages of every rollout of the groups that were not gated."""
        self.score_solutions(groups)
        self.score_metas(groups)

    def score_solutions(self, groups: list[Group]) -> None:
        """Ask the verifier about the solutions: outcome, rewards, advantages."""
        for g in groups:
            if g.solutions:
                g.outcome, rewards = grade_solutions(g.solutions, g.problem, self.s.lenient, self.own_reward)
                for r, reward in zip(g.solutions, rewards, strict=True):
                    r.reward = reward + overlong_penalty(len(r.ids), self.s.max_new, self.s.overlong_buffer)
                set_advantages(g.solutions)

    def score_metas(self, groups: list[Group]) -> None:
        """Hold the metas of the groups that were not gated against the outcome of their solutions."""
        solved = [g for g in groups if g.solutions]
        shifted = solved[1:] + solved[:1]
        if self.s.shuffle_statistics and len(solved) == 1:
            raise InputError("--shuffle-statistics needs two problems a rank and step; raise --batch")
        for g, other in zip(solved, shifted if self.s.shuffle_statistics else solved, strict=True):
            g.parts = [reward_meta(p, g.problem.text, other.outcome, self.s.notion_rate) for p in g.predictions]
            for r, parts in zip(g.metas, g.parts, strict=True):
                r.reward = sum(parts) / 3  # v2 Eq. 2
            set_advantages(g.metas)

    def collect(self, number: int, tally: Tally) -> list[Group]:
        """The scored groups this rank trains on: of one batch, or of as many as it takes to fill one.

        With `dynamic` further batches are sampled until there are `batch` problems solved both rightly and wrongly;
        of flat ones only the metas enter the loss. In control gated problems are replaced by the next of the stream.
        """
        # DAPO:  drops flat groups whole.
        # HERE:  their metas stay in the loss, the solutions, which have no gradient, go.
        # WHY:   else no meta ever learns what a pass rate of 0 or 1 looks like, and the gate looks for just those.
        s, seen, missing = self.s, [], self.s.batch
        controlled = self.controlled(number)
        for attempt in range(s.dynamic_tries if s.dynamic else s.refill_tries if controlled else 1):
            groups = self.next_batch(s.batch if s.dynamic else missing, attempt * s.batch)
            self.roll_out(groups, number, f"{number}.{attempt}")
            self.score_solutions(groups)
            seen += groups
            for g in groups:
                g.metas_only = s.dynamic and g.flat
            places = self.places(g for g in seen if g.solutions and not g.metas_only)
            missing = s.batch - len(places)
            if missing <= 0:
                break
        if controlled and not s.dynamic:
            self.keep_the_floor(seen, number, len(places))
        self.score_metas(seen)
        for g in seen:
            count_group(tally, g, s.max_new)
        last = places[s.batch - 1] if missing <= 0 else math.inf
        kept = [g for g in seen if g.solutions and g.place <= last]
        return [g for g in kept if g.trained]

    def places(self, groups: Iterable[Group]) -> list[int]:
        """The sorted places of such groups on all ranks."""
        return sorted(place for part in self.ranks.gather([g.place for g in groups]) for place in part)

    def keep_the_floor(self, seen: list[Group], number: int, sampled: int) -> None:
        """Sample gated problems after all, the first of the step, where fewer than gate_floor of the batch are left."""
        s = self.s
        short = math.ceil(s.gate_floor * s.batch) - sampled
        gated = self.places(g for g in seen if not g.solutions)
        if 2 * sampled < s.batch:
            self.ranks.log(
                f"step {number + 1}: {sampled} of {s.batch} problems are left after the gate ({len(gated)} gated); "
                "watch the accuracy, raise --gate-floor or --refill-tries, or narrow the gate with --gate-margin"
            )
        if short > 0:
            back = [g for g in seen if g.place in gated[:short]]
            self.sample_controlled(back, f"{number}.floor")
            self.score_solutions(back)

    # -- updates

    def packs(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        """Rollouts in forward passes of at most micro_tokens tokens (or one rollout), longest first."""
        packs: list[list[Rollout]] = []
        size = 0
        for r in sorted(rollouts, key=lambda r: -len(r.prompt_ids) - len(r.ids)):
            length = len(r.prompt_ids) + len(r.ids)
            if not packs or size + length > self.s.micro_tokens:
                packs.append([])
                size = 0
            packs[-1].append(r)
            size += length
        return packs

    def batch_of(self, rollouts: list[Rollout], weights: list[float]) -> data.Batch:
        """Rollouts packed; every token of a rollout carries its weight in the loss."""
        rows = [(r.prompt_ids, r.ids, torch.full((len(r.ids),), w)) for r, w in zip(rollouts, weights, strict=True)]
        return data.pack(rows).to(self.ranks.device)

    def keep_old_logp(self, rollouts: list[Rollout]) -> None:
        """Before the first of several updates, keep each token's log-probability under the policy that sampled it."""
        with torch.no_grad():
            for pack in self.packs(rollouts):
                logp = token_logp(self.model, self.batch_of(pack, [1.0] * len(pack)), self.s.temperature, self.impl)
                for r, part in zip(pack, logp.split([len(r.ids) for r in pack]), strict=True):
                    r.logp = part

    def update(self, rollouts: list[Rollout], lr: float, tally: Tally) -> float | None:
        """One optimiser step on the rollouts of all ranks; the gradient's norm, None when no rank has any."""
        s = self.s
        mine = [float(sum(len(r.ids) for r in rollouts)), float(len(rollouts))]
        tokens, sequences = self.ranks.sum(torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)).tolist()
        if not tokens:
            return None
        # Without a KL term rollouts with no advantage have no gradient; they count in the denominators above.
        for pack in self.packs([r for r in rollouts if r.advantage or s.kl]):
            weights = [1 / tokens if s.agg == "token" else 1 / (sequences * len(r.ids)) for r in pack]
            batch = self.batch_of(pack, weights)
            lengths = torch.tensor([len(r.ids) for r in pack], device=self.ranks.device)
            advantage = torch.tensor([r.advantage for r in pack], device=self.ranks.device).repeat_interleave(lengths)
            logp = token_logp(self.model, batch, s.temperature, self.impl)
            old = logp.detach() if pack[0].logp is None else torch.cat([r.logp for r in pack])
            loss, clipped = policy_loss(logp, old, advantage, s.clip_low, s.clip_high, s.clip_dual)
            if pack[0].served is not None:
                loss = loss * self.correct(old, pack, tally)
            if s.kl:
                with torch.no_grad(), lora.disabled(self.model):
                    reference = token_logp(self.model, batch, s.temperature, self.impl)
                kl = kl_to_reference(logp, reference)
                loss = loss + s.kl * kl  # - beta KL of section 3.1; the paper's beta is 0
                tally["kl"] += float((kl.detach() * batch.w).sum()) / s.updates
            total = (loss * batch.w).sum()
            total.backward()
            tally["loss"] += float(total.detach()) / s.updates
            tally["clipped"] += float(clipped.sum())
            tally["clip_high"] += float((clipped & (advantage > 0)).sum())
            tally["clip_low"] += float((clipped & (advantage < 0) & (logp < old)).sum())
            tally["nats"] -= float(logp.detach().sum())
            tally["trained"] += len(clipped)
        return self.apply(lr)

    def correct(self, old: Tensor, pack: list[Rollout], tally: Tally) -> Tensor:
        """(M,): how much each token of a server's samples counts."""
        served = torch.tensor([math.nan if x is None else x for r in pack for x in r.served], device=old.device)
        weights, log_ratio = server_weights(old, served, self.s.is_cap)
        known = ~served.isnan()
        tally["served"] += int(known.sum())
        tally["mismatch"] += float(log_ratio.abs().sum())
        tally["is_weight"] += float(weights[known].sum())
        tally["is_capped"] += int((log_ratio > math.log(self.s.is_cap)).sum())
        return weights

    def apply(self, lr: float) -> float:
        """Sum the gradients of all ranks, clip, step. Returns the norm before clipping."""
        for p in self.names.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.ranks.sum(p.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.names.values()), self.s.max_grad_norm))
        if not math.isfinite(norm):
            raise NumericsError("the gradient is not finite; lower --lr or look at the last rows of metrics.jsonl")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def learn(self, groups: list[Group], lr: float, tally: Tally) -> float | None:
        """`updates` optimiser steps on the groups' rollouts; the last gradient's norm."""
        s, norm = self.s, None
        if s.updates > 1:
            self.keep_old_logp([r for g in groups for r in g.trained if r.advantage or s.kl])
        last = int(max((max(part, default=-1) for part in self.ranks.gather([g.place for g in groups])), default=-1))
        for k in range(s.updates):
            part = [g for g in groups if g.place * s.updates // (last + 1) == k]
            norm = self.update([r for g in part for r in g.trained], lr, tally) or norm
        return norm

    # -- experts

    def clone_experts(self, groups: list[Group], lr: float) -> dict[str, float]:
        """Collect experts; when there are enough, clone them and start again. Eq. 5, Algorithm 1."""
        s = self.s
        if not s.experts:
            return {}
        found = {
            g.place: expert for g in groups if (expert := expert_of(g, self.prompts, s.expert_notion, s.expert_levels))
        }
        merged = {place: e for part in self.ranks.gather(found) for place, e in part.items()}
        self.experts += [merged[place] for place in sorted(merged)]
        row: dict[str, float] = {"experts": len(self.experts)}
        if len(self.experts) < s.experts:
            return row
        # PAPER: theta - beta * grad L_BC after the RL step, beta not given, "5 gradient updates per outer loop".
        # HERE:  beta is --expert-lr or the RL learning rate, each update on all experts, then the set is emptied
        #        (Algorithm 1).
        # WHY:   one optimiser for both, as in the released code, whose own loop keeps what is beyond N.
        weights = expert_weights(self.experts, s.expert_levels)
        share = slice(self.ranks.rank, None, self.ranks.world)
        mine = [
            Rollout(e.prompt_ids, e.ids, "", False, 0, reward=w) for e, w in zip(self.experts, weights, strict=True)
        ]
        losses = []
        for _ in range(s.expert_updates):
            nats = torch.zeros((), device=self.ranks.device)
            for pack in self.packs(mine[share]):
                batch = self.batch_of(pack, [r.reward for r in pack])
                loss = -(token_logp(self.model, batch, s.temperature, self.impl) * batch.w).sum()  # L_BC of Eq. 5
                loss.backward()
                nats += loss.detach()
            self.apply(lr * s.expert_lr / self.lr if s.expert_lr else lr)
            losses.append(float(self.ranks.sum(nats)))
        self.experts = []
        return row | {"bc_loss/first": losses[0], "bc_loss/last": losses[-1]}

    def memory_message(self) -> str:
        """One line: how much memory was in use and what to change."""
        s, device = self.s, self.ranks.device
        flag = "" if s.gradient_checkpointing else " or --gradient-checkpointing"
        remedy = f"use --micro-tokens {max(1, s.micro_tokens // 2)}{flag}, the result stays the same"
        return f"out of memory on {device}; peak {peak_memory(device)}; {remedy}"

    def step(self, number: int) -> dict[str, Any]:
        """One step of Algorithm 1; its row of metrics."""
        started, tally = time.perf_counter(), Tally()
        self.publish(number)
        groups = self.groups = self.collect(number, tally)
        lr = self.lr * min(1.0, (number + 1) / max(1, self.s.warmup_steps))
        with memory_named(self.memory_message):
            norm = self.learn(groups, lr, tally)
            cloned = self.clone_experts(groups, lr)
        row = tally.metrics(self.ranks)
        self.sampled += row["sampled"]
        if number == 0 and row["meta/parsed"] == 0:
            heard = next((r.text for g in groups for r in g.metas), "")[:200]
            raise InputError(
                f"no meta of the first step could be parsed (one: {heard!r}); the model must follow q_meta"
            )
        row |= {
            "kl": row["kl"] if self.s.kl else None,
            "grad_norm": norm,
            "learning_rate": lr,
            **cloned,
            "tokens": self.sampled,
        }
        return {"step": number + 1, **row, "seconds": round(time.perf_counter() - started, 3)}

    # -- evaluation

    def evaluate(self, number: int, name: str, problems: list[Problem]) -> list[dict[str, Any]]:
        """One row a problem: n solutions, how many are right, and what metas foresaw. On every rank, all rows."""
        self.publish(number)
        s, rows = self.s, []
        mine = problems[self.ranks.rank :: self.ranks.world]
        limit = min(s.eval_max_new, self.model.config.max_position_embeddings - s.max_prompt)
        when = f"eval.{number}"
        solutions = [self.jobs(p, "evaluation", when, s.eval_samples, limit) for p in mine]
        metas = [self.jobs(p, "meta", when, s.eval_metas, s.max_new) for p in mine]
        groups = [Group(k, p) for k, p in enumerate(mine)]
        jobs = [j for part in metas + solutions for j in part]
        done = self.complete(jobs, s.eval_temperature, f"evaluating {name}", trained=False)
        self.assign(groups, done[: len(mine) * s.eval_metas], done[len(mine) * s.eval_metas :])
        for g in groups:
            outcome, _ = grade_solutions(g.solutions, g.problem, s.lenient, self.own_reward)
            parts = [reward_meta(p, g.problem.text, outcome, s.notion_rate) for p in g.predictions]
            row = {"step": number, "set": name, "id": g.problem.id, "n": len(g.solutions)}
            row |= {"correct": sum(outcome.correct), "correct_lengths": outcome.correct_lengths}
            row |= {"lengths": outcome.lengths, "at_limit": sum(r.cut for r in g.solutions)}
            if g.metas:
                said = [p for p in g.predictions if p is not None]
                row |= {"metas": len(g.metas), "parsed": len(said), "meta_tokens": sum(len(r.ids) for r in g.metas)}
                row |= {"p_hats": [p.p_hat for p in said if p.p_hat is not None]}
                row |= {"l_hats": [p.length for p in said if p.length is not None]}
                means = [statistics.fmean(column) for column in zip(*parts, strict=True)]
                row |= dict(zip(("r_length", "r_difficulty", "r_notion"), means, strict=True))
                row["gated"] = is_gated(g.predictions, s.gate_std, s.gate_margin)
                row["cut_at"] = cut_at(g.predictions, s.cutoff, limit)
            rows.append(row)
        found = {row["id"]: row for part in self.ranks.gather(rows) for row in part}
        return [found[p.id] for p in problems]
