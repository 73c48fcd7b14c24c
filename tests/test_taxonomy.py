"""A sixteenth label and a fifth macro strategy: one entry each in em.py, and matrices, prompts and figures follow."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

import em

ROOT = Path(__file__).resolve().parents[1]


def of_the_project(module: ModuleType) -> bool:
    file = Path(getattr(module, "__file__", None) or "/")
    return file.is_relative_to(ROOT) and not {".venv", "tests"} & set(file.parts)


@pytest.fixture
def longer(tmp_path, monkeypatch):
    """em.py with an entry more of each, for whatever of the project is imported from now on."""
    source = Path(em.__file__).read_text(encoding="utf-8")
    at = source.index("\n", source.index(f'"{em.LABELS[-1]}": "')) + 1
    entry = '        "irony": "means the opposite of what it says",\n    },\n    "feelings": {\n'
    entry += '        "wavering": "says that it is not sure",\n'
    (tmp_path / "em.py").write_text(source[:at] + entry + source[at:], encoding="utf-8")
    before = {name: module for name, module in sys.modules.items() if of_the_project(module)}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [
        n for n, m in sys.modules.items() if of_the_project(m) or m.__dict__.get("__file__") == str(tmp_path / "em.py")
    ]:
        del sys.modules[name]
    sys.modules.update(before)


def test_one_more_label_and_one_more_macro_strategy(longer, tmp_path):
    import em as longer_em
    from llm import committee
    from report import figures

    labels, states = longer_em.LABELS, longer_em.STATES
    K = len(em.STATES) + 2
    assert len(states) == K and labels[-1] == "wavering"
    steps = [["framing"], ["irony", "wavering"], ["wavering"]]
    fits = [longer_em.fit([o for _ in range(n) for o in longer_em.observations(steps)]) for n in (9, 1, 3)]
    P = fits[0].P
    a, b = states.index("irony"), states.index("wavering")
    assert P.shape == (K, K) and abs(P.sum(1) - 1).max() < 1e-12 and P[a, b] > 1 / (K - 1) > P[a, 1]
    assert longer_em.segment_weights(steps, P, P) == [1.0, 1.0, 1.0]
    named = dict(zip(("P_pos", "P_neg", "P"), (t.P.tolist() for t in fits), strict=True))
    named |= dict(zip(("C_pos", "C_neg", "C"), (t.C.tolist() for t in fits), strict=True))
    figures.transition_figure(named | {"states": states, "n_pos": 9, "n_neg": 1}, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1000
    text = committee.vocabulary()
    assert "feelings:" in text and "- wavering: says that it is not sure" in text
    assert "- irony: means the opposite" in text
    step = committee.reply_schema()["properties"]["steps"]["items"]["properties"]
    assert step["meta_reasoning_strategies"]["items"]["enum"] == list(labels)
    assert len(set(figures.MACRO_COLOURS.values())) == len(longer_em.TAXONOMY) == len(em.TAXONOMY) + 1
