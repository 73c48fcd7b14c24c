"""What the README says is so: equations at their lines, targets, layers, the study's table, the first picture."""

import ast
import html
import math
import re
from pathlib import Path

import pytest

from common.files import read_json

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYERS = [
    {"files", "kto", "ranks", "measure"},
    {"client", "hub", "verifier", "passk"},
    {"settings", "kernels", "em", "data", "model"},
    {"lora", "sample", "annotate", "checkpoint", "ledger", "benchmarks", "formats"},
    {"remote", "train", "chat", "agreement", "export", "retrieve"},
    {"eval", "committee", "bench", "endings"},
    {"labelling", "analysis", "report"},
    {"judge", "charts", "plan"},
    {"veriscore", "tables", "page"},
    {"mralign", "masa", "gpu_check", "discover"},
    {"mini", "sweep"},
]


def test_every_equation_is_at_the_line_the_readme_names():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[([\w/.]+)#L(\d+)\]\(\2#L\3\) `([^|]+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 12
    for paper, file, line, code in rows:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        where = [n for n, text in enumerate(lines, 1) if code in text]
        assert int(line) in where, f"{paper}: {code!r} is at {file} lines {where}, README says {line}"
    for equation in ("1", "2", "3", "4", "7", "8", "9", "10", "11", "12"):
        assert any(re.search(rf"Eq\. [\d, ]*\b{equation}\b", paper) for paper, *_ in rows), f"Eq. {equation} is missing"


def test_make_targets_and_files_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", README)) <= targets
    for link in re.findall(r"\]\(([\w./-]+)(?:#L\d+)?\)", README):
        assert (ROOT / link).exists(), link


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_a_file_imports_only_lower_layers():
    level = {name: k for k, names in enumerate(LAYERS) for name in names}
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("mini/*.py")]
    assert {p.stem for p in ROOT.glob("*.py")} | {"kernels", "mini"} == set(level)
    for path in files:
        name = path.stem if path.parent == ROOT else path.parent.name
        for other in imports(path) & level.keys() - {name}:
            assert level[other] < level[name], f"{path.name} imports {other}"


def test_nothing_unsafe_is_used():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("mini/*.py")]:
        assert not imports(path) & {"pickle", "marshal", "shelve", "dill"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                given = {k.arg for k in node.keywords}
                assert name not in ("eval", "exec", "compile", "torch.load", "torch.save", "yaml.load"), (path, name)
                assert not given & {"shell", "trust_remote_code", "verify"}, (path, name)


def test_the_study_table_is_the_committed_study():
    from mini import study

    begin, end = study.MARKS
    table = README.partition(begin)[2].partition(end)[0].strip()
    assert table == study.markdown(read_json(ROOT / "docs/results/study.json"))


def test_the_first_picture_adds_up():
    """Every number of the README's picture, from the probabilities and log-ratios, in plain arithmetic."""
    s = read_json(ROOT / "docs/one_question.json")
    r_kto = r = s["answer_logratio"]
    for step in s["segments"]:
        w = 1.0
        if step["p_class"] is not None:
            w = min(math.e, max(1 / math.e, step["p_class"] / step["p_all"]))
        assert step["w"] == pytest.approx(w, rel=1e-9)
        r += w * step["logratio"]
        r_kto += step["logratio"]
    assert (s["r_kto"], s["r_mralign"]) == pytest.approx((r_kto, r), abs=1e-9)
    side = 1 if s["chosen"] else -1
    sigma = 1 / (1 + math.exp(-side * s["beta"] * (r - s["z0"])))
    assert s["v"] == pytest.approx(s["lambda"] * sigma, abs=1e-9)
    assert s["loss"] == pytest.approx(s["lambda"] - s["v"], abs=1e-9)
    h = 1e-6  # the gradient by a finite difference of the loss in r

    def loss(r):
        return s["lambda"] * (1 - 1 / (1 + math.exp(-side * s["beta"] * (r - s["z0"]))))

    slope = (loss(r + h) - loss(r - h)) / (2 * h)
    assert s["grad_answer"] == pytest.approx(slope, abs=1e-8)
    assert s["grads"] == pytest.approx([slope * step["w"] for step in s["segments"]], abs=1e-7)


def test_the_first_picture_shows_these_numbers():
    s = read_json(ROOT / "docs/one_question.json")
    drawn = html.unescape((ROOT / "docs/one_question.svg").read_text(encoding="utf-8")).replace("\u2212", "-")
    for value in (s["r_mralign"], s["r_kto"]):
        assert f"{value:.5f}".replace("0.", ".", 1) in drawn or f"{value:.5f}" in drawn
    assert f"{s['loss']:.6f}".lstrip("0") in drawn
    for step in s["segments"]:
        assert f"{step['w']:.4f}".lstrip("0") in drawn
