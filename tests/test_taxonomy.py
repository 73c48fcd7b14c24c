"""A sixteenth label and a fifth macro strategy: one entry each in em.py, and matrices, prompts and figures follow."""

import shutil
import subprocess
import sys
from pathlib import Path

import em

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import em
from llm import committee
from report import charts, figures

assert len(em.STATES) == K and em.LABELS[-1] == "doubt"
steps = [["framing"], ["irony", "doubt"], ["doubt"]]
fits = [em.fit([o for _ in range(n) for o in em.observations(steps)]) for n in (9, 1, 3)]
P = fits[0].P
a, b = em.STATES.index("irony"), em.STATES.index("doubt")
assert P.shape == (K, K) and abs(P.sum(1) - 1).max() < 1e-12 and P[a, b] > 1 / (K - 1) > P[a, 1]
assert em.segment_weights(steps, P, P) == [1.0, 1.0, 1.0]
named = dict(zip(("P_pos", "P_neg", "P"), (t.P.tolist() for t in fits)))
named |= dict(zip(("C_pos", "C_neg", "C"), (t.C.tolist() for t in fits)))
figures.transition_figure(named | {"states": em.STATES, "n_pos": 9, "n_neg": 1}, "t.png")
text = committee.vocabulary()
assert "feelings:" in text and "- doubt: says that it is not sure" in text and "- irony: means the opposite" in text
step = committee.reply_schema()["properties"]["steps"]["items"]["properties"]
assert step["meta_reasoning_strategies"]["items"]["enum"] == list(em.LABELS)
assert len(set(figures.MACRO_COLOURS.values())) == len(em.TAXONOMY) == MACROS
print("done")
"""


def test_one_more_label_and_one_more_macro_strategy(tmp_path):
    for name in ("common", "llm", "report", "kernels", "prompts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    source = (ROOT / "em.py").read_text(encoding="utf-8")
    at = source.index("\n", source.index(f'"{em.LABELS[-1]}": "')) + 1
    entry = '        "irony": "means the opposite of what it says",\n    },\n    "feelings": {\n'
    entry += '        "doubt": "says that it is not sure",\n'
    (tmp_path / "em.py").write_text(source[:at] + entry + source[at:], encoding="utf-8")
    sizes = f"K, MACROS = {len(em.STATES) + 2}, {len(em.TAXONOMY) + 1}\n"
    done = subprocess.run([sys.executable, "-c", sizes + PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    assert (tmp_path / "t.png").stat().st_size > 1000
