"""The folder of a model that is named by a path, or by its id on the Hugging Face hub.

`model_folder("meta-llama/Llama-3.1-8B")`: where no such folder exists, the hub's local cache is looked
into; where that has no whole copy, huggingface_hub fetches one, if it is installed. A whole copy is used
without asking the network for a newer one. "org/name@revision" names a branch, a tag or a commit.
"""

import os
import re
from pathlib import Path

from cli import InputError, one_line
from files import checkpoint_folder, read_json, read_text

ID = re.compile(r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>\w[\w./-]{0,199}))?", re.ASCII)
NEEDED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "original/tokenizer.model"]
OFFLINE = ("1", "ON", "YES", "TRUE")


def model_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder that `name` says, a path or a hub id. weights: else its configuration is enough.

    A name is an id only where its first part is no folder here: a misspelt path asks no network. Raises
    InputError where there is no folder, and where it cannot be fetched.
    """
    match = ID.fullmatch(str(name))
    if match is None or os.path.lexists(name) or os.path.lexists(Path(name).parts[0]):
        return checkpoint_folder(name)
    repo, revision = match["repo"], match["revision"] or "main"
    found = cached(repo, revision)
    if found is None or not is_whole(found, weights):
        found = fetch(repo, revision, found is not None, NEEDED if weights else ["config.json"])
    return checkpoint_folder(found)


def cache_folder() -> Path:
    """Where huggingface_hub keeps its copies, by the variables that it reads."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    beside = os.environ.get("XDG_CACHE_HOME") or Path("~") / ".cache"
    home = os.environ.get("HF_HOME") or Path(beside) / "huggingface"
    return Path(home).expanduser() / "hub"


def cached(repo: str, revision: str) -> Path | None:
    """The cache's snapshot of a repository; revision: a branch or tag that was fetched, or a whole commit."""
    folder = cache_folder() / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = read_text(ref, most=1 << 10).strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch(r"[\w.-]+", commit) and snapshot.is_dir() else None


def is_whole(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has a configuration and all weights: a download may have been stopped."""
    if not weights or any(folder.glob("pytorch_model*.bin")):  # the latter are refused, with what would do
        return (folder / "config.json").is_file()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        files = {name for name in names.values() if isinstance(name, str)} if isinstance(names, dict) else ()
    else:
        files = ["model.safetensors"]
    return all((folder / name).is_file() for name in ("config.json", *files))


def fetch(repo: str, revision: str, partly: bool, needed: list[str]) -> Path:
    """A snapshot by huggingface_hub, which shows its progress and goes on where it was stopped."""
    state = "is in the hub cache only in part" if partly else "is no folder here, nor in the hub cache"
    where = f"{repo} (revision {revision}) {state} ({cache_folder()})"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFFLINE:
        raise InputError(f"{where}, and HF_HUB_OFFLINE forbids to fetch it; unset that, or name a folder.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{where}; to fetch it, pip install huggingface_hub, or download the folder and name its path."
        ) from None
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=needed))
    except Exception as error:  # of the network, the hub, the disk: it has dozens, by its version
        reason = one_line(str(error)).rstrip(".") or type(error).__name__
        raise InputError(f"{where}, and could not be fetched: {reason[:300]}.") from None
