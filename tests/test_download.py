"""Protects: downloads that are whole, verified, resumed, and refused in one sentence; against a server of our own."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import DATA, ROOT

from scripts import download
from scripts.download import digest_of, main, read_table

CONTENT = {"/a/b/c0ffee/x%20y.txt": b"0123456789" * 1000, "/a/b/c0ffee/z.txt": b"z" * 10}


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; `broken` bytes only, when set; with ranges, when `ranges`."""

    broken, ranges, asked = None, True, []

    def do_GET(self):
        content, start = CONTENT.get(self.path), 0
        if content is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        Handler.asked.append((self.path, wanted))
        if wanted and Handler.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : Handler.broken])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    rows = ["file\trepository\tpath\tcommit\tlicence\tbytes\tsha256"]
    for name, path, url in (
        ("one/x.txt", "x y.txt", "/a/b/c0ffee/x%20y.txt"),
        ("two/z.txt", "z.txt", "/a/b/c0ffee/z.txt"),
    ):
        content = CONTENT[url]
        rows.append(
            f"{name}\ta/b\t{path}\tc0ffee\tMIT\t{len(content)}\t{hashlib.sha256(content).hexdigest()}"
        )
    (tmp_path / "table.tsv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(download, "TABLE", tmp_path / "table.tsv")
    Handler.broken, Handler.ranges, Handler.asked = None, True, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def fails(argv, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("from ")]
    assert stop.value.code == 2 and len(err) == 1
    return err[0]


def test_files_come_whole_and_only_once(server, tmp_path, capsys):
    out = tmp_path / "data"
    main(["all", "--source", server, "--out", str(out)])
    assert (out / "one" / "x.txt").read_bytes() == CONTENT["/a/b/c0ffee/x%20y.txt"] and (
        out / "two" / "z.txt"
    ).exists()
    said = capsys.readouterr()
    assert "2 files, 10,010 bytes, verified" in said.out and "from a/b: MIT" in said.err
    assert len(Handler.asked) == 2 and not list(out.rglob("*.part"))
    main(["all", "--source", server, "--out", str(out)])
    assert len(Handler.asked) == 2  # verified, not fetched
    (out / "two" / "z.txt").write_text("mine")
    assert "is there, but is not the file" in fails(["two", "--source", server, "--out", str(out)], capsys)
    assert (out / "two" / "z.txt").read_text() == "mine"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(server, tmp_path, capsys, ranges):
    out, argv = tmp_path / "data", ["one", "--source", server, "--out", str(tmp_path / "data")]
    Handler.broken, Handler.ranges = 4000, ranges
    assert "broke off after 4000 of 10000 bytes" in fails(argv, capsys)
    assert (out / "one" / "x.txt.part").stat().st_size == 4000 and not (out / "one" / "x.txt").exists()
    Handler.broken = None
    main(argv)
    assert (out / "one" / "x.txt").read_bytes() == CONTENT["/a/b/c0ffee/x%20y.txt"]
    assert Handler.asked[-1][1] == "bytes=4000-"


def test_a_wrong_file_is_not_kept(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CONTENT, "/a/b/c0ffee/z.txt", b"y" * 10)
    assert "another file than the one" in fails(
        ["two/z.txt", "--source", server, "--out", str(tmp_path / "data")], capsys
    )
    monkeypatch.setitem(CONTENT, "/a/b/c0ffee/z.txt", b"z" * 20)
    assert "another file than the one" in fails(
        ["two/z.txt", "--source", server, "--out", str(tmp_path / "data")], capsys
    )
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))


def test_mistakes_and_a_missing_network_are_one_sentence(server, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "data")]
    assert "There is no file three; known are all, one, two" in fails(["three", *out], capsys)
    assert "Name what to fetch" in fails(out, capsys)
    assert "cannot be reached" in fails(["one", "--source", "http://127.0.0.1:9", *out], capsys)
    assert "cannot be reached" in fails(["one", "--source", "http://no.such.host.invalid", *out], capsys)
    monkeypatch.delitem(CONTENT, "/a/b/c0ffee/z.txt")
    assert "404" in fails(["two", "--source", server, *out], capsys)
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in fails(["one", "--source", server, "--out", str(tmp_path / "file")], capsys)


def test_what_is_no_regular_file_is_neither_hashed_nor_replaced(server, tmp_path, capsys):
    out = tmp_path / "data"
    (out / "one").mkdir(parents=True)
    argv, name, part = (
        ["one", "--source", server, "--out", str(out)],
        out / "one" / "x.txt",
        out / "one" / "x.txt.part",
    )
    for path, make, words in ((name, os.mkfifo, "is a pipe"), (name, os.mkdir, "is a folder"), (name, lambda p: p.symlink_to("x.txt"), "Too many levels"),
                              (part, os.mkfifo, "it is a pipe"), (part, os.mkdir, "it is a folder"), (part, lambda p: p.symlink_to("/dev/null"), "it is a device")):  # fmt: skip
        make(path)
        before = os.lstat(path)
        assert words in fails(argv, capsys) and os.lstat(path).st_mode == before.st_mode
        path.rmdir() if path.is_dir() else path.unlink()
    assert not Handler.asked and "/dev/null" in fails([*argv[:-1], "/dev/null"], capsys)
    assert "File name too long" in fails([*argv[:-1], str(tmp_path / ("n" * 300))], capsys)
    (tmp_path / "dangling").symlink_to("nothing")
    assert (
        "a link to nothing" in fails([*argv[:-1], str(tmp_path / "dangling")], capsys) and not Handler.asked
    )


def test_a_part_that_another_process_downloads_is_not_touched(server, tmp_path, capsys):
    part = tmp_path / "data" / "one" / "x.txt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"01234")
    hold = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import files\nfile = open({str(part)!r}, 'a'); files.lock(file, '')\nprint('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert "another process" in fails(
            ["one", "--source", server, "--out", str(tmp_path / "data")], capsys
        )
        holder.kill()
    assert part.read_bytes() == b"01234" and not Handler.asked
    main(["one", "--source", server, "--out", str(tmp_path / "data")])
    assert Handler.asked == [("/a/b/c0ffee/x%20y.txt", "bytes=5-")] and not part.exists()


def test_a_source_that_is_no_address_or_that_nothing_comes_from_leaves_no_part(tmp_path, capsys, server):
    for source in (
        "",
        "nonsense",
        "http://",
        "http://[::1",
        "ftp://127.0.0.1:9",
        "http://127.0.0.1:99999",
        "x" * 5000,
        "http://a b/",
    ):
        assert "run it again to go on" in fails(
            ["one", "--source", source, "--out", str(tmp_path / "data")], capsys
        )
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))


@pytest.mark.skipif(not DATA.exists(), reason="needs the public files")
def test_the_table_is_that_of_the_files():
    files = read_table()
    assert len(files) == len({file.file for file in files}) and {
        file.file.split("/")[0] for file in files
    } > {
        "gsm8k",
        "mmlu",
        "arc",
    }
    for file in files:
        if (path := DATA / file.file).exists():
            assert (path.stat().st_size, digest_of(path)) == (int(file.bytes), file.sha256), file.file
    assert all(file.licence and len(file.commit) == 12 for file in files)
