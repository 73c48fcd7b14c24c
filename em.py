"""Which kind of thinking follows which: transition matrices from set-valued labels, and the weight of every step.

A thinking trace is a list of steps, each with a set of one or two labels (no label: the chain breaks there). The first
step is entered from <start>, the last one leaves to <stop>. A move I -> J between two sets came from exactly one hidden
edge (a, b) with a in I and b in J. `fit` estimates the matrix P of those edges by EM (paper, Algorithms 1-2 in Appendix
E), `pair_prob` gives Pr(J | I, P) (Eq. 7), and `segment_weights` compares a class's matrix with everyone's (Eq. 10).
`frequency` and `one_label` are the two ablations of Table 3.

Worked by hand, with the states <start>, a, b, <stop> (0..3) and one trace of two steps, {a} then {a, b}:
  observations   {<start>} -> {a},   {a} -> {a, b},   {a, b} -> {<stop>}
  start          every row uniform over a, b, <stop>: 1/3 each; <stop> stays in <stop>
  E-step 1       C[<start>,a] = 1;   C[a,a] = C[a,b] = 1/2;   C[a,<stop>] = C[b,<stop>] = 1/2
  M-step 1       row <start> = (1.1, .1, .1) / 1.3;   row a = (.6, .6, .6) / 1.8;   row b = (.1, .1, .6) / .8
  damping .6     P[<start>,a] = .4/3 + .6 * 1.1/1.3 = .641026;   P[a,.] = 1/3;   P[b,<stop>] = .4/3 + .6 * .75 = .583333
  E-step 2       {a, b} -> {<stop>} now splits 4/11 to a and 7/11 to b (1/3 against .583333)
  Eq. 7          Pr({<stop>} | {a, b}) = (1/3 + .583333) / 2 = .458333

Left out: confidences as mixing weights (the paper's rho is uniform), second-order chains, self-moves inside a merged
step.
"""

import difflib
import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from common.errors import InputError

# Macro strategy -> label -> its meaning (Section 3.1.2; the meanings of Appendix B.6 in our words). Matrices, prompts,
# figures and the page read this table: one more label, or one more macro strategy, is an entry here.
TAXONOMY = {
    "meta-cognitive regulation": {
        "framing": "says what is being asked, what counts as an answer and which limits apply",
        "backtracking": "gives up the current line and goes back to an earlier point to try another one",
        "self_verification": "checks a claim it has just made for truth or consistency before relying on it",
        "evaluation": "judges candidate answers or ideas against the evidence and settles on one",
    },
    "problem-solving operations": {
        "decomposition": "breaks the question into smaller ones that can be answered one by one",
        "chaining": "goes from one inference to the next, each resting on the one before",
    },
    "knowledge operations": {
        "causal_reasoning": "asks what causes what, by which mechanism, or what would happen otherwise",
        "retrieval": "brings up a fact from memory or a source because the question needs it",
        "analogy": "carries the structure of a familiar case over to this one",
        "synthesis": "puts several facts or partial results together into one consistent view",
        "comparison": "sets alternatives side by side and says how they differ on stated points",
        "categorization": "decides which class or type something belongs to",
        "case_analysis": "works through a concrete example or precedent and applies it here",
    },
    "explanatory & communication": {
        "explanation": "spells out why a claim holds, for someone who reads along",
        "summarization": "repeats the main points in short, adding nothing new",
    },
}
LABELS = tuple(label for labels in TAXONOMY.values() for label in labels)  # the paper has 15
STATES = ("<start>", *LABELS, "<stop>")  # K = 17 in the paper; row and column order of every matrix

CLIP = (1 / math.e, math.e)  # m and M of Eq. 10 (Section 4.1; the printed "m = 1e" is 1/e)

StateSet = tuple[int, ...]  # ascending indices into the state list, without repeats
Observation = tuple[StateSet, StateSet]  # I -> J


@dataclass(frozen=True)
class Transitions:
    """A fitted transition matrix over K states.

    P (K, K) float64: row-stochastic, P[a, b] = Pr(next is b | now a).
    C (K, K) float64: soft counts of the last E-step, the support behind each cell of P.
    alpha_post (K, K) float64: C + prior on the allowed cells.
    objective: log-likelihood (Eq. 8) + prior * sum of log P over the allowed cells, in nats: at the start and after
    each iteration. It never falls.
    """

    P: np.ndarray
    C: np.ndarray
    alpha_post: np.ndarray
    objective: tuple[float, ...]


def check_labels(labels: Collection[str], where: str, states: Sequence[str] = STATES) -> None:
    """Raise InputError, starting with `where`, at a label outside the closed vocabulary or when there are over two."""
    known = states[1:-1]
    for label in labels:
        if label not in known:
            near = difflib.get_close_matches(str(label), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(known)}"
            raise InputError(f"{where}: unknown label {label!r}; {hint}")
    if len(set(labels)) > 2:
        raise InputError(f"{where}: {len(set(labels))} labels ({', '.join(sorted(set(labels)))}); keep at most two")


@functools.cache
def _index(states: tuple[str, ...]) -> dict[str, int]:
    return {label: i for i, label in enumerate(states[1:-1], 1)}


def _chain(steps: Sequence[Collection[str]], states: tuple[str, ...]) -> list[StateSet]:
    """<start>, then every step, as state sets; a step without a label is ()."""
    index = _index(states)
    chain: list[StateSet] = [(0,)]
    for t, labels in enumerate(steps):
        codes = {index.get(label, -1) for label in labels}
        if -1 in codes or len(codes) > 2:
            check_labels(labels, f"step {t}", states)  # raises
        chain.append(tuple(sorted(codes)))
    return chain


def incoming(steps: Sequence[Collection[str]], states: tuple[str, ...] = STATES) -> list[Observation | None]:
    """For each step of one trace the move INTO it; None where a step without a label breaks the chain.

    steps: one collection of 0-2 labels per step, in order; the order inside a collection means nothing.
    Step 0 is entered from <start>. The result has one entry a step. Raises InputError on an unknown label or on more
    than two.

    incoming([["framing"], ["retrieval", "evaluation"]]) -> [((0,), (1,)), ((1,), (4, 8))]
    """
    return [(source, target) if source and target else None for source, target in pairwise(_chain(steps, states))]


def observations(steps: Sequence[Collection[str]], states: tuple[str, ...] = STATES) -> list[Observation]:
    """All moves of ONE trace, from <start> to <stop> (Section 3.2.2). Arguments and errors as in `incoming`.

    Neither move of a step without a label is observed (it has no edge: Algorithm 2, line 8). No steps, no moves.
    """
    chain = [*_chain(steps, states), (len(states) - 1,)] if steps else []
    return [(source, target) for source, target in pairwise(chain) if source and target]


def mask(n_states: int) -> np.ndarray:
    """A (K, K) float64, 1 where a move is allowed: never into <start>, from <stop> only to itself (Algorithm 1)."""
    A = np.ones((n_states, n_states))
    A[:, 0] = 0
    A[-1, :] = 0
    A[-1, -1] = 1
    return A


def _group(obs: Iterable[Observation], n_states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Membership rows of the distinct sets, U (n_I, K) and V (n_J, K), and how often each pair was seen, N (n_I, n_J).

    Sets are sorted, so the result (and every sum taken over it) does not depend on the order of the observations.
    """
    counts = Counter(obs)
    sources = {members: row for row, members in enumerate(sorted({source for source, _ in counts}))}
    targets = {members: row for row, members in enumerate(sorted({target for _, target in counts}))}
    U, V = np.zeros((len(sources), n_states)), np.zeros((len(targets), n_states))
    N = np.zeros((len(sources), len(targets)))
    for members, row in sources.items():
        U[row, list(members)] = 1
    for members, row in targets.items():
        V[row, list(members)] = 1
    for (source, target), count in counts.items():
        N[sources[source], targets[target]] = count
    return U, V, N


def _objective(P: np.ndarray, A: np.ndarray, U: np.ndarray, V: np.ndarray, N: np.ndarray, prior: float) -> float:
    """What the M-step climbs: Eq. 8 plus the prior's prior * sum over allowed cells of log P."""
    pair = (U @ P @ V.T) / np.outer(U.sum(1), V.sum(1))  # (n_I, n_J) Eq. 7 for every pair of sets
    seen = (N > 0) & (pair > 0)
    return float((N[seen] * np.log(pair[seen])).sum() + prior * np.log(P[A > 0]).sum())


def fit(
    obs: Iterable[Observation],
    max_iter: int = 5,
    tol: float = 1e-6,
    damping: float = 0.6,
    prior: float = 0.1,
    states: tuple[str, ...] = STATES,
) -> Transitions:
    """Estimate the transition matrix of a corpus by damped MAP-EM (Algorithms 1-2).

    obs: moves of all traces, or a Counter of them. Equal moves are grouped, so an iteration costs the same for a
    thousand traces and for a million. With no observation every row stays uniform over its allowed cells.
    damping in (0, 1]: share of the new estimate in each iteration. prior > 0: pseudo-count of each allowed cell.
    Five iterations do not converge (about a hundred would); P is defined as the result of five.
    """
    assert 0 < damping <= 1, damping
    assert prior > 0, prior  # keeps every allowed cell of P above 0, and with it every denominator here and in Eq. 10
    A = mask(len(states))
    U, V, N = _group(obs, len(states))
    P = A / A.sum(1, keepdims=True)
    C = np.zeros_like(A)
    objective = [_objective(P, A, U, V, N, prior)]
    for _ in range(max_iter):
        last = P
        # E-step: an observation gives edge (a, b) the share P_ab / S, S the sum of P over its edges. 1/|I| and 1/|J|
        # are constant within an observation and cancel. Summed over all observations this is one matrix product.
        # PAPER: line 15 splits evenly when S <= 0.  HERE: no such branch.  WHY: prior > 0, so S = 0 only if no edge of
        # the observation is allowed, which lines 8-9 skip.
        S = U @ P @ V.T  # (n_I, n_J)
        C = P * (U.T @ np.divide(N, S, out=np.zeros_like(N), where=S > 0) @ V)  # (K, K)
        P_new = C + prior * A
        P_new /= P_new.sum(1, keepdims=True)  # M-step, lines 18-21
        P = (1 - damping) * last + damping * P_new  # line 22
        objective.append(_objective(P, A, U, V, N, prior))
        # PAPER: `last` has no value in the first iteration.  HERE: it is the starting matrix.
        if np.abs(P - last).max() < tol:
            break
    return Transitions(P=P, C=C, alpha_post=C + prior * A, objective=tuple(objective))


def frequency(obs: Iterable[Observation], prior: float = 0.1, states: tuple[str, ...] = STATES) -> Transitions:
    """Ablation without EM: each observation's count is split evenly over its allowed edges, then smoothed.

    From the uniform start EM's first E-step is exactly that even split, so this is one undamped iteration.
    PAPER: "frequency-weighted baseline" (Section 4.3), not spelt out.  HERE: the even split.
    """
    return fit(obs, max_iter=1, damping=1.0, prior=prior, states=states)


def one_label(steps: Sequence[Sequence[str]], confidences: Sequence[Sequence[float]]) -> list[tuple[str, ...]]:
    """Ablation without label diversity: the most confident label of each step; a tie goes to the first in LABELS.

    steps, confidences: parallel, one list of 0-2 labels and their confidences (0-10) per step.
    """
    kept: list[tuple[str, ...]] = []
    for labels, confidence in zip(steps, confidences, strict=True):
        ranked = sorted(zip(labels, confidence, strict=True), key=lambda pair: (-pair[1], LABELS.index(pair[0])))
        kept.append(tuple(label for label, _ in ranked[:1]))
    return kept


def pair_prob(P: np.ndarray, source: StateSet, target: StateSet) -> float:
    """Pr(target | source, P): the mean of P over the edges between the sets, as rho is uniform on both (Eq. 7)."""
    return float(sum(P[a, b] for a in source for b in target)) / (len(source) * len(target))  # Eq. 7


def segment_weights(
    steps: Sequence[Collection[str]],
    P_class: np.ndarray,
    P_all: np.ndarray,
    clip: tuple[float, float] = CLIP,
    states: tuple[str, ...] = STATES,
) -> list[float]:
    """w of every step of one trace: how much likelier the move into it is in its class than overall (Eq. 10).

    P_class: P_pos for a chosen row, P_neg for a rejected one; P_all: all rows; both (K, K) from `fit`.
    A step without a label and the step after it have w = 1. Raises InputError as `incoming` does.
    """
    low, high = clip
    weights = []
    for move in incoming(steps, states):
        ratio = 1.0 if move is None else pair_prob(P_class, *move) / pair_prob(P_all, *move)
        weights.append(min(max(ratio, low), high))  # Eq. 10
    return weights
