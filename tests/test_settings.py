"""settings.py: what a field may be is said once and holds for a flag, a JSON file and an object made by hand."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from common.endings import program
from common.errors import InputError
from common.settings import check, cli, from_json, opt


@dataclass(frozen=True)
class Settings:
    preset: str = opt("", "a preset", "first")
    backend: str = opt("auto", "which one", choices=("auto", "sdpa", "flash"))
    rank: int = opt(16, "LoRA rank", "numbers", low=1)
    rpm: int = opt(0, "requests a minute; 0: no limit", low=1)
    share: float = opt(0.5, "a share", low=0, high=1)
    rate: float = opt(1e-4, "learning rate", above=0)
    free: float = opt(0.0, "any finite number")
    seed: int = opt(0, "any whole number that fits 64 bits")
    quiet: bool = opt(False, "say less")

    __post_init__ = check


BAD = [
    ("backend", "triton", "one of auto, sdpa, flash"),
    ("backend", "", "one of auto, sdpa, flash"),
    ("rank", 0, "a whole number from 1"),
    ("rpm", -1, "a whole number from 1"),
    ("share", 1.5, "a finite number from 0 up to 1"),
    ("share", -0.1, "a finite number from 0 up to 1"),
    ("rate", 0.0, "a finite number above 0"),
    ("rate", float("nan"), "a finite number above 0"),
    ("share", float("nan"), "a finite number from 0 up to 1"),
    ("free", float("inf"), "a finite number"),
    ("free", float("-inf"), "a finite number"),
    ("free", 1e300, "a number within 3e+38"),
    ("seed", 2**63, "a number within 9.22337e+18"),
    ("seed", -(10**30), "a number within 9.22337e+18"),
]


@pytest.mark.parametrize(("name", "value", "needed"), BAD)
def test_one_rule_and_one_form_for_flags_files_and_objects(tmp_path: Path, name, value, needed) -> None:
    said = f" is {value!r}, must be {needed}"
    with pytest.raises(InputError) as caught:
        cli(Settings, [f"--{name}={value}"], "")
    assert str(caught.value) == f"--{name}{said}"
    with pytest.raises(InputError) as caught:
        Settings(**{name: value})
    assert str(caught.value) == f"--{name}{said}"
    with pytest.raises(InputError):
        replace(Settings(), **{name: value})
    if value == value and abs(float(value or 0) if not isinstance(value, str) else 0) != float("inf"):
        path = tmp_path / "a.json"
        path.write_text(json.dumps({name: value}))
        with pytest.raises(InputError) as caught:
            cli(Settings, ["--config", str(path)], "")
        assert str(caught.value) == f"{path}: {name}{said}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"free": 1e999}', "free is inf, must be a finite number"),
        ('{"free": NaN}', "not valid JSON"),
        ('{"rank": 2.0}', "rank is 2.0, must be a whole number"),
        ('{"rank": true}', "rank is True, must be a whole number"),
        ('{"share": "1"}', "share is '1', must be a number"),
        ('{"quiet": 1}', "quiet is 1, must be true or false"),
        ('{"backend": null}', "backend is None, must be a text"),
        ('{"bakend": "auto"}', "unknown setting 'bakend'"),
        ("[]", "must hold one JSON object"),
    ],
)
def test_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        from_json(Settings, str(path))
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)


def test_good_values_at_the_bounds_and_defaults_outside_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"share": 1, "rate": 2, "rpm": 0, "backend": "sdpa"}')  # 0 is the default: no limit
    s, rest = cli(Settings, ["--config", str(path), "--share=0", "--backend", "flash", "--quiet"], "")
    assert (s.share, s.rate, s.rpm, s.backend, s.quiet) == (0.0, 2.0, 0, "flash", True) and type(s.rate) is float
    assert cli(Settings, [], "")[0] == Settings()


def test_a_preset_is_checked_too() -> None:
    with pytest.raises(InputError, match="--rank is 0, must be a whole number from 1"):
        cli(Settings, ["--preset", "p"], "", presets={"p": {"rank": 0}, "": {}})
    with pytest.raises(InputError, match="--preset 'q' is not one of p"):
        cli(Settings, ["--preset", "q"], "", presets={"p": {}})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--no-such", "1"], "unrecognized arguments: --no-such 1; --help lists every flag"),
        (["--rank", "many"], "argument --rank: invalid int value: 'many'; --help lists every flag"),
        (["--rank"], "argument --rank: expected one argument; --help lists every flag"),
    ],
)
def test_words_that_cannot_be_read_are_one_line_and_code_2(capsys: pytest.CaptureFixture, words, said) -> None:
    assert program(lambda: cli(Settings, words, "") and None)() == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_help_shows_choices_groups_and_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli(Settings, ["--help"], "about")
    shown = capsys.readouterr().out.partition("about")[2]
    assert "--backend {auto,sdpa,flash}" in shown and "which one [auto]" in shown
    assert shown.index("first:") < shown.index("--backend") < shown.index("numbers:") < shown.index("--rank int")


def test_a_config_of_the_project_works_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="configs/mini.json: unknown setting"):  # found, though not ours
        from_json(Settings, "configs/mini.json")


@pytest.mark.parametrize(
    ("text", "needed"), [('{"backend": "a\\u0000b"}', "without NUL"), (f'{{"rate": {10**400}}}', "a number")]
)
def test_a_file_with_what_no_path_and_no_number_can_be(tmp_path: Path, text, needed) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"a.json: .*, must be {needed}|a.json: .* must be .*{needed}"):
        from_json(Settings, str(tmp_path / "a.json"))
