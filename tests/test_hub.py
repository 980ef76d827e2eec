"""Protects: a hub id is found in the hub's cache, or fetched whole, or its sentence says what would do; a path asks no network."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_folder

from checkpoint import read_config
from cli import InputError
from hub import NEEDED, cache_folder, model_folder
from quantize import load_model
from scripts import plan

COMMIT = "0" * 39 + "a"
FOLDERS = {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of models by seed, made before the client is hidden: transformers needs it."""
    folders = {seed: tmp_path_factory.mktemp("made") / "model" for seed in (1, 2, 3)}
    for seed, folder in folders.items():
        make_folder(folder, seed=seed)
    return folders


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """An empty hub cache, no huggingface_hub, and a current folder with nothing in it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(FOLDERS, "made", made)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home" / "hub"


def put(cache, name="some/llama", ref="main", commit=COMMIT, seed=1):
    """A model in the cache as the hub's client lays it out: blobs, a snapshot of links, a ref."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", (repo / "refs" / ref).parent):
        folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(FOLDERS["made"][seed].iterdir())):
        blob = repo / "blobs" / f"{commit[-4:]}{number}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (repo / "refs" / ref).write_text(commit)
    return snapshot


def fake_client(monkeypatch, answer):
    """A huggingface_hub whose snapshot_download is noted, and answers so."""
    calls = []

    def snapshot_download(*args, **more):
        calls.append((args, more))
        return answer()

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return calls


def test_an_id_is_the_caches_snapshot(cache, monkeypatch):
    snapshot = put(cache)
    calls = fake_client(monkeypatch, lambda: pytest.fail("a whole copy asks nobody"))
    assert model_folder("some/llama") == snapshot and not calls
    torch.testing.assert_close(
        load_model("some/llama").norm.weight, load_model(snapshot).norm.weight, rtol=0, atol=0
    )
    assert plan.shape_of("some/llama") == (read_config(snapshot), snapshot)


def test_a_revision_is_a_branch_or_a_commit(cache):
    main, other = put(cache), put(cache, ref="refs/pr/3", commit="b" * 40, seed=2)
    assert model_folder("some/llama@main") == model_folder(f"some/llama@{COMMIT}") == main
    assert model_folder("some/llama@refs/pr/3") == model_folder("some/llama@" + "b" * 40) == other
    for wrong in ("c" * 40, "v2", "refs/pr/4"):
        with pytest.raises(InputError, match=rf"some/llama \(revision {wrong}\) is no folder here, nor in"):
            model_folder(f"some/llama@{wrong}")


@pytest.mark.parametrize(
    "variable, value, place",
    [
        ("HF_HUB_CACHE", "x", "x"),
        ("HUGGINGFACE_HUB_CACHE", "y", "y"),
        ("HF_HOME", "z", "z/hub"),
        ("XDG_CACHE_HOME", "w", "w/huggingface/hub"),
        ("HOME", "/home/me", "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_client_has_it(cache, monkeypatch, variable, value, place):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, value)
    assert str(cache_folder()) == place


def test_a_folder_here_comes_first_and_a_misspelt_path_asks_no_network(cache, monkeypatch, tmp_path):
    put(cache)
    calls = fake_client(monkeypatch, lambda: pytest.fail("asked"))
    shutil.copytree(FOLDERS["made"][3], tmp_path / "here" / "some" / "llama")
    assert model_folder("some/llama").resolve() == tmp_path / "here" / "some" / "llama"
    for path in ("some/lama", "../some/llama", "/some/llama", "a/b/c", "some//lama", "~/llama"):
        with pytest.raises(InputError, match="There is no checkpoint folder"):
            model_folder(path)
    assert not calls


def test_what_is_missing_is_fetched_whole_and_once(cache, monkeypatch):
    calls = fake_client(monkeypatch, lambda: str(put(cache)))
    assert (
        model_folder("some/llama")
        == model_folder("some/llama")
        == cache / "models--some--llama" / "snapshots" / COMMIT
    )
    assert calls == [(("some/llama",), {"revision": "main", "allow_patterns": NEEDED})]
    assert not any("bin" in pattern or pattern == "*" for pattern in NEEDED)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "a shard"])
def test_a_copy_in_part_is_fetched_on(cache, monkeypatch, lost):
    snapshot = put(cache)
    if lost == "a shard":
        (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (snapshot / lost).unlink()
    with pytest.raises(InputError, match="is in the hub cache only in part .*pip install huggingface_hub"):
        model_folder("some/llama")
    calls = fake_client(monkeypatch, lambda: snapshot)
    assert model_folder("some/llama") == snapshot and len(calls) == 1


def test_a_plan_needs_no_weights(cache, monkeypatch):
    snapshot = put(cache)
    (snapshot / "model.safetensors").unlink()
    assert plan.shape_of("some/llama")[1] == snapshot
    calls = fake_client(monkeypatch, lambda: snapshot)
    plan.shape_of("other/llama")
    assert calls[0][1]["allow_patterns"] == ["config.json"]


def test_why_it_is_not_fetched(cache, monkeypatch, capsys):
    with pytest.raises(InputError, match="to fetch it, pip install huggingface_hub, or download the folder"):
        model_folder("some/llama")

    def fail():
        raise ConnectionError("no route\nto the hub")

    calls = fake_client(monkeypatch, fail)
    with pytest.raises(InputError, match=r"could not be fetched: no route\\nto the hub\.$"):
        model_folder("some/llama")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids"):
        model_folder("some/llama")
    assert len(calls) == 1


def test_the_real_client_without_a_network(cache, monkeypatch):
    monkeypatch.undo()
    client = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **more):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(cache))
    with pytest.raises(InputError, match="some/llama .* could not be fetched: "):
        model_folder("some/llama")


def test_the_command_line_takes_an_id(cache, monkeypatch, capsys):
    import generate

    with pytest.raises(SystemExit) as ended:
        generate.main(["--checkpoint_path", "some/llama", "--prompt", "x"])
    assert ended.value.code == 2 and "pip install huggingface_hub" in capsys.readouterr().err
