"""hub.py against a server that answers as the Hub does: what is fetched, what is recorded, what each refusal says."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, NAME, TOKEN, FakeHub

from common import hub
from common.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
WANTED = {
    "config.json": b"{}",
    "model-00001-of-00001.safetensors": b"weights " * 500,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "merges.txt": b"a b",
}
UNWANTED = {name: b"!" for name in ("pytorch_model.bin", "modeling.py", "README.md", "original/model.safetensors")}
PROGRAM = """
import json, os, sys
from common import hub
from common.errors import InputError
for line in sys.stdin:
    try:
        source = hub.locate(*json.loads(line))
        told = json.dumps([str(source.folder), source.name, source.commit, sorted(os.listdir(source.folder))])
    except InputError as error:
        told = f"InputError: {error}"
    print(json.dumps(told), flush=True)
"""
Locate = Callable[..., str]


@pytest.fixture(scope="module")
def locate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locate]:
    """hub.locate in another process, one for each environment: the library reads its variables when it is imported."""
    log = tmp_path_factory.mktemp("hub") / "stderr"
    processes: dict[tuple[object, ...], subprocess.Popen[str]] = {}

    def ask(home: Path, url: str, *args: str, **variables: str) -> str:
        key = (home, url, *sorted(variables.items()))
        if key not in processes:
            env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            env |= {"PYTHONPATH": str(ROOT)} | variables
            with open(log, "a") as stderr:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
                processes[key] = subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, cwd=home, **pipes)
        process = processes[key]
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(args) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, log.read_text()
        assert TOKEN not in line + log.read_text()
        return json.loads(line)

    yield ask
    for process in processes.values():
        process.communicate()
        assert process.returncode == 0
    assert TOKEN not in log.read_text()


def test_a_download_and_what_comes_after_it(locate: Locate, tmp_path: Path) -> None:
    with FakeHub(WANTED | UNWANTED) as server:
        folder, name, commit, files = json.loads(locate(tmp_path, server.url, NAME))
        assert (name, commit) == (NAME, COMMIT) and files == sorted(WANTED)
        assert all((Path(folder) / f).read_bytes() == content for f, content in WANTED.items())
        asked = {path.rpartition("/")[2] for method, path in server.requests if "/resolve/" in path}
        assert asked == set(WANTED)  # nothing else was even looked at
        assert all(hub.member(folder, f).is_file() for f in files)  # the cache's links are allowed

        server.requests.clear()
        tagged = json.loads(locate(tmp_path, server.url, NAME, "v1"))
        assert tagged[2] == COMMIT and not [path for _, path in server.requests if "/resolve/" in path]
        message = locate(tmp_path, server.url, NAME, "v9")
        assert message == f"InputError: {NAME} at v9: the Hub has no such revision of it; check --revision"

    # Without a network the cache is enough, for the branch and for the commit it was.
    for revision in ([], [COMMIT]):
        assert json.loads(locate(tmp_path, server.url, NAME, *revision, HF_HUB_OFFLINE="1"))[2] == COMMIT
    assert json.loads(locate(tmp_path, server.url, NAME))[2] == COMMIT  # the server is gone


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no network", "offline"])
def test_a_miss_says_what_to_run_elsewhere(locate: Locate, tmp_path: Path, variables: dict[str, str]) -> None:
    message = locate(tmp_path, "http://127.0.0.1:9", NAME, "v1", **variables)
    assert message.startswith(f"InputError: {NAME} at v1: no such directory, and as a model of the Hub")
    assert f"run: hf download {NAME} --revision v1 --include '*.safetensors'" in message and "\n" not in message


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model-00002-of-00002.safetensors", "index"])
def test_half_a_snapshot_offline_names_the_command(locate: Locate, home: Path, missing: str) -> None:
    """What an interrupted or hand-made download leaves: the library calls it the model, and later stages would fail."""
    shards = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}})
    whole = {"config.json": "{}", "tokenizer.json": "{}", **dict.fromkeys(shards, "x")}
    whole["model.safetensors.index.json"] = index
    cache = home / "hub" / f"models--{NAME.replace('/', '--')}"
    shutil.rmtree(cache, ignore_errors=True)
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    for name, text in whole.items():
        (snapshot / name).write_text(text)
    assert json.loads(locate(home, "http://127.0.0.1:9", NAME, HF_HUB_OFFLINE="1"))[2] == COMMIT
    name = "model.safetensors.index.json" if missing == "index" else missing
    (snapshot / name).unlink()
    message = locate(home, "http://127.0.0.1:9", NAME, HF_HUB_OFFLINE="1")
    lacking = "model.safetensors" if missing == "index" else missing
    assert message.startswith(
        f"InputError: {NAME}: its snapshot in the cache has no {lacking}; where there is a network"
    )
    assert f"hf download {NAME} --include '*.safetensors'" in message and "\n" not in message


def test_gated_and_unknown_models(locate: Locate, tmp_path: Path) -> None:
    with FakeHub(WANTED, gated=True) as server:
        assert "the model is gated; accept its terms" in locate(tmp_path, server.url, NAME)
        assert json.loads(locate(tmp_path, server.url, NAME, HF_TOKEN=TOKEN))[2] == COMMIT
        assert server.tokens == {"", TOKEN}
        message = locate(tmp_path, server.url, "acme/none")
        assert message.startswith("InputError: acme/none: no such directory, and the Hub has no such model or hides it")


@pytest.mark.long
def test_a_download_that_breaks_off(locate: Locate, tmp_path: Path) -> None:
    """It fails by name, leaves nothing that would pass for the model, and goes on when the server is well again."""
    shard = "model-00001-of-00001.safetensors"
    with FakeHub(WANTED, cut=shard) as server:
        message = locate(tmp_path, server.url, NAME)
        assert "the download failed" in message and "received 2000 bytes, expected 4000" in message
        assert "not whole in the cache" in locate(tmp_path, server.url, NAME, HF_HUB_OFFLINE="1")
        server.cut = ""
        folder = Path(json.loads(locate(tmp_path, server.url, NAME))[0])
        assert (folder / shard).read_bytes() == WANTED[shard]


def test_an_existing_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert hub.locate(NAME) == hub.Source(Path(NAME), NAME, "")
    with pytest.raises(InputError, match="--revision v1: acme/tiny is a directory"):
        hub.locate(NAME, "v1")


@pytest.mark.parametrize("name", ["a/b/c", "../model", "/no/such/model", "a..b/c", "a b", "", "-x/y z", "model\n"])
def test_what_is_neither_a_directory_nor_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(InputError, match="no such directory, and no Hub id"):
            hub.locate(name)
    with pytest.raises(InputError, match="is not a plain file name"):
        hub.member(tmp_path, name if "/" in name or not name else f"{name}/x")


def test_members(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "inside").write_text("x")
    (folder / "again").symlink_to("inside")
    (tmp_path / "outside").write_text("x")
    (folder / "out").symlink_to("../outside")
    (folder / "up").symlink_to("..")
    for name in ("inside", "again", "not there yet"):
        assert hub.member(folder, name) == folder / name
    for name in ("out", "up", ".."):
        with pytest.raises(InputError, match="a link out of the folder"):
            hub.member(folder, name)
    # blobs beside a folder that is no snapshot of the cache is a folder like any other
    (tmp_path.parent / "blobs").mkdir(exist_ok=True)
    (folder / "blob").symlink_to(tmp_path.parent / "blobs" / "x")
    with pytest.raises(InputError, match="a link out of the folder"):
        hub.member(folder, "blob")
