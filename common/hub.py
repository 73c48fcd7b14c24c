"""Where a model is: a folder or a Hub id becomes a folder on this machine and the commit it was taken from.

`locate` reads a folder that exists as it is; any other name is looked up on the Hugging Face Hub, its revision resolved
to a commit, and the files this project can read are fetched into the Hub's usual cache. `member` is the guard in front
of every file of such a folder, which somebody else may have written.

The Hub's own variables are obeyed: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT. Left out on purpose: pickled weights
(*.bin, *.pt), Python files of a repository, uploads, a flag for a token.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from common.files import ROOT, read_json

FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")
HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A located model. name: as it was given, for whoever looks for it later. commit: "" for a folder."""

    folder: Path
    name: str
    commit: str = ""


def locate(model: str, revision: str = "") -> Source:
    """The folder of `model`: a directory that exists, else a Hub id, downloaded at `revision` (a branch, tag, commit).

    Raises InputError when it is neither, when the Hub does not have it or does not give it, and when it cannot be
    reached and the cache lacks it; the message then says what to run where there is a network.
    """
    for folder in (Path(model), ROOT / model):  # a shipped model works from every working directory
        if folder.is_dir():
            if revision:
                raise InputError(f"--revision {revision}: {model} is a directory, which has none; leave the flag out")
            return Source(folder, model)
    if not HUB_ID.fullmatch(model) or ".." in model:
        raise InputError(f"{model}: no such directory, and no Hub id (owner/name) either; check the spelling")
    folder = _download(model, revision)
    return Source(folder, model, folder.name)  # the cache names a snapshot after its commit


def config_of(model: str, revision: str = "") -> Path | None:
    """config.json of a Hub id, fetched without the weights; None where it cannot be had: `locate` says why."""
    if (ROOT / model).is_dir() or not HUB_ID.fullmatch(model) or ".." in model:
        return None
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision or None))
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError):
        return None


def _download(model: str, revision: str) -> Path:
    """The snapshot of a Hub id in the cache, complete."""
    # Imported here: it reads its environment when imported, and a folder needs none of it.
    from huggingface_hub import errors, snapshot_download

    what = f"{model} at {revision}" if revision else model
    command = " ".join(["hf download", model, *([f"--revision {revision}"] if revision else [])])
    command += "".join(f" --include '{pattern}'" for pattern in FILES)
    try:
        found = snapshot_download(model, revision=revision or None, allow_patterns=list(FILES), ignore_patterns="*/*")
        folder = Path(found)
    except errors.GatedRepoError:
        raise InputError(
            f"{what}: the model is gated; accept its terms on its Hub page and export HF_TOKEN with a token of that "
            "account"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{what}: the Hub has no such revision of it; check --revision") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{model}: no such directory, and the Hub has no such model or hides it; check the spelling, or export "
            "HF_TOKEN for a private one"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{what}: no such directory, and as a model of the Hub not whole in the cache while the Hub cannot be "
            f"reached; where there is a network run: {command}; then copy its HF_HOME here"
        ) from None
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what}: the download failed ({reason}); run it again, what has arrived is kept") from None
    if absent := lacking(folder):  # offline, the library gives whatever part of a snapshot there is
        raise InputError(
            f"{what}: its snapshot in the cache has no {absent}; where there is a network run: {command}; "
            "a file that is missing then is not in the repository"
        )
    return folder


def lacking(folder: Path) -> str:
    """The first file without which a model is not whole, "" when all are there."""
    index = folder / "model.safetensors.index.json"
    needed = ["config.json", "tokenizer.json"]
    if index.exists():
        listing = read_json(index)
        weights = listing.get("weight_map") if isinstance(listing, dict) else None
        needed += sorted({str(name) for name in weights.values()}) if isinstance(weights, dict) else []
    else:
        needed.append("model.safetensors")
    return next((name for name in needed if not (folder / name).exists()), "")


def member(folder: str | Path, name: str) -> Path:
    """The path of a file of a model folder, whether it exists or not.

    Raises InputError at a name that is a path, and at a link that leads out of the folder; the links of the Hub's
    cache, from snapshots/<commit> to blobs beside it, are good.
    """
    folder = Path(folder)
    if not name or Path(name).name != name or "\0" in name or "\\" in name:
        raise InputError(f"{folder}: {name!r} is not a plain file name; fetch the folder again from a source you trust")
    home = folder.resolve()
    target = (home / name).resolve()
    blobs = home.parent.parent / "blobs"
    if target.parent not in ([home, blobs] if home.parent.name == "snapshots" else [home]):
        raise InputError(f"{folder / name}: a link out of the folder, to {target}; put the file itself there")
    return folder / name
