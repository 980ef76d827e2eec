"""cli.py and files.py: what is no regular file is left as it is, one process at a time writes, causes are named truly, and
Ctrl-C is silent from the first instruction on."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli import InputError, Parser, Progress, note, one_line, run_script, whole
from files import (
    Lines,
    check_writable,
    parse_json,
    read_bytes,
    read_json_lines,
    read_text,
    replacing,
    write_file,
)

ROOT = Path(__file__).resolve().parent.parent
HOLD = "import sys, time; sys.path.insert(0, {root!r}); import files; from pathlib import Path\n{body}\nprint('held', flush=True)\ntime.sleep(60)"


def odd_files(folder: Path) -> list[Path]:
    """One of each kind of thing that is no regular file, made in a folder."""
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "to_fifo").symlink_to("fifo")
    return [folder / name for name in ("fifo", "socket", "folder", "loop", "to_fifo")]


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path):
    for path in [*odd_files(tmp_path), Path("/dev/null"), Path("/dev/full"), Path("/dev/zero")]:
        before = os.lstat(path)
        for action in (check_writable, read_bytes, read_text, Lines, lambda path: write_file(path, b"x")):
            with pytest.raises(InputError, match="cannot be|is a|no regular"):
                action(path)
        assert (
            stat.S_IFMT(os.lstat(path).st_mode) == stat.S_IFMT(before.st_mode)
            and os.lstat(path).st_ino == before.st_ino
        )
    assert not list(tmp_path.glob("*.tmp"))


def test_neither_is_what_stands_where_a_file_is_written_first(tmp_path):
    for odd in odd_files(tmp_path):
        odd.rename(odd.with_name(odd.name + ".tmp"))
        kind = os.lstat(odd.with_name(odd.name + ".tmp"))
        for action in (check_writable, lambda path: write_file(path, b"x")):
            with pytest.raises(InputError, match=r"\.tmp, where that is done first, is no regular file"):
                action(odd)
        assert os.path.samestat(os.lstat(odd.with_name(odd.name + ".tmp")), kind) and not os.path.lexists(odd)


@pytest.mark.parametrize("name", ["n" * 300, "n" * 253, "no/such/folder/file"])
def test_names_that_cannot_be_written_are_refused_before_any_work(tmp_path, name):
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(tmp_path / name, "--out")


def test_a_read_only_file_is_left_alone_even_by_root(tmp_path):
    path = tmp_path / "kept"
    path.write_text("kept")
    path.chmod(0o444)
    with pytest.raises(InputError, match="read-only"):
        write_file(path, b"lost")
    assert path.read_text() == "kept"


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", b"first")  # dangling
    write_file(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"second"


def test_modes_follow_the_umask_and_an_old_file_keeps_its_own(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "new", b"x")
        (tmp_path / "old").write_bytes(b"y")
        (tmp_path / "old").chmod(0o604)
        write_file(tmp_path / "old", b"x")
        with replacing(
            tmp_path / "other"
        ) as fresh:  # a library may make the file anew, with a mode of its own
            fresh.unlink()
            os.close(os.open(fresh, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "old": 0o604, "other": 0o640}


@pytest.mark.parametrize(
    "body",
    ["lines = files.Lines(Path({path!r}))", "held = files.replacing(Path({path!r})); held.__enter__()"],
)
def test_a_file_in_use_by_another_process_is_not_touched(tmp_path, body):
    path = tmp_path / "out"
    path.write_bytes(b'{"whole": 1}\n{"half": ')
    code = HOLD.format(root=str(ROOT), body=body.format(path=str(path)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        for action in (Lines, lambda path: write_file(path, b"x")):
            with pytest.raises(InputError, match="another process"):
                action(path)
        holder.kill()
    assert path.read_bytes() == b'{"whole": 1}\n{"half": '
    lines = Lines(path)
    assert lines.objects() == [{"whole": 1}] and path.read_bytes().endswith(
        b'{"half": '
    )  # nothing is cut by looking
    lines.add({"more": 2})
    assert path.read_bytes() == b'{"whole": 1}\n{"more": 2}\n'


def test_a_file_of_lines_that_nothing_was_written_to_does_not_stay(tmp_path):
    Lines(tmp_path / "new").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs root and mount namespaces"
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    code = """if 1:
        import sys; sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from files import InputError, Lines, write_file
        small = Path(sys.argv[2])
        (small / "old").write_bytes(b"old")
        for action in (lambda: write_file(small / "old", b"x" * 10**6), lambda: Lines(small / "lines").add({"a": "x" * 10**6})):
            try: action()
            except InputError as error: print(error)
        print((small / "old").read_bytes(), sorted(p.name for p in small.iterdir()))"""
    script = 'mount -t tmpfs -o size=64k none "$2" && exec "$0" -c "$3" "$1" "$2"'
    command = ["unshare", "-m", "sh", "-c", script, sys.executable, str(ROOT), str(tmp_path), code]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script.replace("$0", sys.executable), "sh", *command[-3:]],
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no mount namespaces here")
    first, second, last = done.stdout.splitlines()
    assert "No space left" in first and "No space left" in second and "goes on" in second
    assert last == "b'old' ['lines', 'old']"


@pytest.mark.parametrize(
    ("text", "cause"),
    [("1" * 5000, "5000 digits"), ('{"a": ' + "9" * 25 + "}", "25 digits"), ("[" * 100000, "too deeply"),
     ('"\\ud800"', "surrogate"), ("{", "not valid JSON"), (b"\xff", "not valid JSON"), ("NaNs", "not valid JSON")],
)  # fmt: skip
def test_json_names_the_true_cause(text, cause):
    with pytest.raises(InputError, match=cause):
        parse_json(text, "here")


def test_json_keeps_what_is_in_bounds():
    value = {"id": 2**63, "low": -(2**63), "pair": "\U0001f642", "digits": "1" * 30, "numbers": [1.5, 10**17]}
    assert parse_json(json.dumps(value), "here") == value


def test_lines_are_named_by_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\n[2]\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 3 is a JSON list"):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_a_file_beyond_its_bound_is_not_read(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(InputError, match="more than"):
        read_bytes(tmp_path / "huge")


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc")
def test_what_never_ends_though_it_calls_itself_a_regular_file_is_refused():
    with pytest.raises(InputError, match="/proc/self/pagemap (goes on far beyond|cannot be read)"):
        read_bytes("/proc/self/pagemap")


def test_a_sentence_is_one_line_of_bounded_length():
    assert one_line("a\nb\x1b[31m") == "a\\nb\\x1b[31m" and len(one_line("x" * 10**6)) < 1000


@pytest.mark.parametrize("text", ["0", "11", "-1", "9" * 500, "1.5", "", "ten", "\u0661"])
def test_whole_numbers_of_flags_are_bounded(text, capsys):
    parser = Parser("")
    parser.add_argument("--n", type=whole(1, 10), default=0)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--n", text])
    assert stop.value.code == 2 and "from 1 to 10" in capsys.readouterr().err
    assert parser.parse_args(["--n", "10"]).n == 10 and "(default: 0)" in parser.format_help()


def test_bytes_that_are_no_utf8_are_no_value(capsys):
    parser = Parser("", prog="a.py")
    parser.add_argument("--b")
    for argv in (["--b", "\udc80x"], ["--b=\udc80x"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(argv)
        assert "--b: '\\udc80x' is not valid Unicode" in capsys.readouterr().err
    assert parser.parse_args(["--b", "\u00e4\U0001f600?"]).b == "\u00e4\U0001f600?"


def test_two_dashes_are_no_value(capsys):
    for more in ({}, {"nargs": "+"}, {"type": int}):
        parser = Parser("")
        parser.add_argument("--device", **more)
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--device=--"])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), PermissionError(13, "Permission denied", "x"), MemoryError()],
)
def test_what_the_system_refuses_is_one_sentence(error, capsys):
    def action():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script("a.py", action)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


SCRIPTS = sorted(
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
    if "__main__" in path.read_text() and path.name != "cli.py"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_interrupt_while_a_script_starts_is_silent(script):
    """SIGINT as soon as the script's own first instruction has run (cli.py is open): nothing printed, exit code 130."""
    code = f"""if 1:
        import os, runpy, signal, sys
        sys.argv = [{str(script)!r}, "--help"]
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name in ("argparse", "torch"):
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Finder())
        import types; sys.modules["__main__"].__file__ = sys.argv[0]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        sys.modules.pop("argparse", None)
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_note_amid_progress_stands_on_a_line_of_its_own(monkeypatch, capsys):
    now = iter(range(0, 100, 3))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = Progress("answers", 3)
    progress.step()
    note("warmed up")
    progress.step()
    progress.step()
    assert capsys.readouterr().err == "\ranswers: 1/3\nwarmed up\n\ranswers: 2/3\ranswers: 3/3\n"
    note("done")
    assert capsys.readouterr().err == "done\n"


def test_closed_and_full_streams_are_one_sentence():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cli; cli.run_script('a.py', lambda: print('done'))"
    script = [sys.executable, "-c", code]
    for where, said in ((">&-", "standard output is closed"), (">/dev/full", "No space left")):
        done = subprocess.run(["sh", "-c", f'"$@" {where}', "sh", *script], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n"


def test_interrupt_in_the_midst_of_work_is_130_and_silent(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cli, time; cli.run_script('a.py', lambda: (print('on', flush=True), time.sleep(60)))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.communicate() == (b"", b"") and child.returncode == 130
