"""What the README says is so: equations at their lines, targets, layers, the study's table, the first picture."""

import ast
import functools
import html
import math
import re
from pathlib import Path

import pytest

from common.files import read_json

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A folder may import from folders that stand to its left; top-level files are "core", and mralign.py is above them all.
ORDER = [{"common"}, {"kernels"}, {"core"}, {"report", "llm"}, {"pipeline"}, {"mralign"}]
BESIDE = {"masa": {"common", "kernels", "core", "llm"}}  # may use these; only itself, tools and mini may use it
COMMANDS = {"tools", "mini"}  # may use anything; nobody uses them


def test_every_equation_is_in_the_file_the_map_names():
    """By the text of the line, so that an edit above it breaks nothing."""
    page = (ROOT / "docs/equations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[([\w/.]+)\]\(\.\./\2\) \| `(.+)` \|$", page, re.MULTILINE)
    assert len(rows) == page.count("](../") >= 12
    for paper, file, code in rows:
        found = (ROOT / file).read_text(encoding="utf-8").count(code)
        assert found == 1, f"{paper}: {code!r} is {found} times in {file}, must be there once"
    for equation in ("1", "2", "3", "4", "7", "8", "9", "10", "11", "12"):
        assert any(re.search(rf"Eq\. [\d, ]*\b{equation}\b", paper) for paper, *_ in rows), f"Eq. {equation} is missing"


def test_what_the_pages_name_exists():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"`make ([a-z][\w-]*)", text)) <= targets, page
        for link in re.findall(r"\]\((?!http|#)([\w./-]+)(?:#[\w-]+)?\)", text):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
        for module in re.findall(r"python -m ((?:tools|masa|mini|common)[\w.]*)", text):
            assert module in source_files() or f"{module}.__main__" in source_files(), f"{page}: {module}"


def test_reading_takes_the_minutes_the_readme_says():
    """At some 20 lines a minute; a file that is read in part has fewer than it is long."""
    rows = re.findall(r"^\| \[([\w./]+)\]\(\1\) \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 6
    for file, minutes in rows:
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        whole = file in ("em.py", "kto.py", "mralign.py")
        assert int(minutes) <= lines / 20 + 1.5 and (not whole or int(minutes) >= lines / 20 - 1.5), (file, lines)


def source_files() -> dict[str, Path]:
    """Dotted name -> file, of everything but tests: {"em": em.py, "report.page": report/page.py, ...}."""
    found = [*ROOT.glob("*.py"), *(p for d in folders() for p in (ROOT / d).glob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in found}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def folders() -> list[str]:
    """The folders with Python files, but the tests."""
    return sorted({p.parent.name for p in ROOT.glob("*/*.py")} - {"tests"})


@functools.cache
def imported_by(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it: those of the project as `source_files` has them."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def folder_of(name: str) -> str:
    if name == "mralign":
        return name
    first = name.partition(".")[0]
    return "core" if (ROOT / f"{first}.py").is_file() else first  # data.py, beside data/ with fetched sets


def test_imports_go_down_only():
    files = source_files()
    level = {folder: k for k, of in enumerate(ORDER) for folder in of}
    assert set(folders()) == set(level) - {"core", "mralign"} | set(BESIDE) | COMMANDS
    for name, path in files.items():
        here = folder_of(name)
        for other in imported_by(path) & files.keys() - {name}:
            there = folder_of(other)
            if here == there or here in COMMANDS:
                continue
            allowed = there in BESIDE[here] if here in BESIDE else level.get(there, 99) < level[here]
            assert allowed, f"{path.relative_to(ROOT)} imports {other}: {here} stands below {there}"


def test_no_file_imports_itself_in_a_circle():
    files = source_files()
    below = {name: imported_by(path) & files.keys() - {name} for name, path in files.items()}
    done: set[str] = set()
    while left := below.keys() - done:
        free = {name for name in left if below[name] <= done}
        assert free, f"a circle among {sorted(left)}"
        done |= free


def test_every_folder_says_what_belongs_there():
    for folder in folders():
        doc = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
        assert doc and doc.endswith("."), folder


def test_nothing_runs_at_import():
    """The top level of a file holds definitions, imports, constants, and what stands under a main guard."""
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.AugAssign
    for path in source_files().values():
        if path.name == "__main__.py":
            continue
        for node in tree(path).body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            absent = isinstance(node, ast.Try | ast.If)  # an optional library
            assert isinstance(node, allowed) or text or guard or absent, (
                f"{path}:{node.lineno}: {ast.unparse(node)[:60]}"
            )


def called(function: ast.expr) -> str:
    """`f` or `module.f`; nothing for what has no such name."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def test_nothing_unsafe_is_used():
    for path in source_files().values():
        assert not imported_by(path) & {"pickle", "marshal", "shelve", "dill"}, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                name, given = called(node.func), {k.arg for k in node.keywords}
                assert name not in ("eval", "exec", "compile", "torch.load", "torch.save", "yaml.load"), (path, name)
                assert not given & {"shell", "trust_remote_code", "verify"}, (path, name)


def test_the_study_table_is_the_committed_study():
    from mini import study

    begin, end = study.MARKS
    table = study.PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()
    assert table == study.markdown(read_json(ROOT / "docs/results/study.json"))


def test_the_readmes_figures_are_the_committed_ones():
    words = " ".join(README.split())
    found = read_json(ROOT / "docs/results/distance.json")
    for group, pair, shown in (
        ("both worlds", "mralign - kto", "{mean:.1f} points of Acc [{low:.1f}, {high:.1f}]"),
        ("both worlds", "shuffled - kto", "nothing of it is left, {mean:.1f} [{low:.1f}, {high:.1f}]"),
        ("both worlds", "mean - kto", "class's mean weight, {mean:.1f} [{low:.1f}, {high:.1f}]"),
        ("null", "mralign - kto", "level with KTO, {mean:.1f} [{low:.1f}, {high:.1f}]"),
    ):
        of = found["groups"][group]["differences"][pair]["acc"]["average"]
        assert shown.format(**{key: 100 * of[key] for key in ("mean", "low", "high")}) in words, (group, pair)
    assert f"commit {found['commit'][0]}" in words
    hard = read_json(ROOT / "docs/results/hard.json")
    ahead = hard["own best"]["hard worlds"]["methods"]["kto"]["acc ahead"]
    equal = hard["groups"]["hard worlds"]["differences"]["mralign - kto"]["acc"]["average"]
    shown = "MR-ALIGN is {:.1f} points [{:.1f}, {:.1f}] ahead of KTO, at equal distance {:.1f} [{:.1f}, {:.1f}]"
    assert shown.format(*(100 * of[key] for of in (ahead, equal) for key in ("mean", "low", "high"))) in words
    for setting, name in (("kto", "KTO"), ("mralign", "MR-ALIGN")):
        of = read_json(ROOT / "docs/results/study.json")["groups"]["both worlds"]["settings"][setting]["test_acc"]
        assert f"{name} {100 * of['mean']:.1f} ± {100 * of['sd']:.1f}" in words


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
