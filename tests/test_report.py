"""Protects: what the report says of hand-made results, that nothing in them becomes markup, filters and keys in a browser."""

import html
import json
import os
import re
import subprocess
import sys

import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT

from cli import InputError
from scripts import report
from scripts.lib.intervals import paired_interval
from scripts.lib.runs import read_run

HEADER = {"questions": "demo", "data": None, "target": "aaaa1111", "draft": "bbbb2222", "judge": "cccc3333", "speculate_k": 4,
          "details": True, "chat": False}  # fmt: skip
EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;<!--"
)


def record(rule: str, index: int, right: bool | None, words: list[str], origin: str, **more) -> dict:
    """A result line with a word a token; r tokens get p 0.1, 0.2, ... as they come, others 0.9."""
    doubts = iter(more.pop("p", [n / 10 for n in range(1, 10)]))
    p = [next(doubts) if letter == "r" else 0.9 for letter in origin]
    rounds = len(re.findall("[ar]*[tb]|[ar]+$", origin))
    return {"index": index, "rule": rule, "family": "story", "right": right, "answer_right": right, "final_answer": "7",
            "question": f"Question {index}?", "tokens": list(range(len(words))), "text": "".join(words), "rounds": rounds,
            "drafted": 0 if rule == "plain" else 4 * rounds, "accepted": origin.count("a") + origin.count("r"),
            "accepted_by_rule": origin.count("r"), "seconds_decode": 1.0, "speculate_k": 4, "origin": origin,
            "threshold": 0.8 if rule == "judge" else None, "cuts": [len(word) for word in words], "p": p,
            "kl": [1.5 if letter == "r" else 0.00004 for letter in origin], "score": [0.875] * len(words),
            "top": [" other" if letter == "r" else None for letter in origin], **more}  # fmt: skip


RECORDS = [
    record("plain", 0, True, ["The", " sum", " is", " 7"], "tttt"),
    record("judge", 0, False, ["So", " the", " sum", " is", " 8", ""], "raarat", p=[0.3, 0.01]),
    record("plain", 1, True, ["Two", " plus", " five"], "ttt"),
    record("judge", 1, True, ["Two", " and", " five"], "art", p=[0.2], score=[0.9, 0.6, 0.9]),
    record("plain", 2, False, ["No", " idea"], "tt"),
    record("judge", 2, False, ["No", " idea"], "ab"),
    record("plain", 3, True, [EVIL, "é\n", "🙂"], "ttt", question=EVIL, final_answer=EVIL, family=EVIL),
    record(
        "judge",
        3,
        True,
        [EVIL, "é\n", "🙂"],
        "rrt",
        p=[0.5, 0.6],
        question=EVIL,
        final_answer=EVIL,
        family=EVIL,
    ),
]


def write(path, records=RECORDS, header=HEADER):
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *records]), encoding="utf-8")
    return path


def make(folder, records=RECORDS, header=HEADER) -> str:
    report.main([str(write(folder / "results.jsonl", records, header)), "--out", str(folder / "report.html")])
    return (folder / "report.html").read_text(encoding="utf-8")


def cells(page: str, rule: str) -> list[str]:
    row = re.search(rf"<tr><th>(?:(?!</th>).)*{rule}</th>(.*?)</tr>", page)[1]
    return [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


def test_the_summary_by_hand(tmp_path):
    """judge: right 2 of 4, lost item 0, won none; 5, 2, 1 and 2 draft tokens accepted in a round each."""
    page = make(tmp_path)
    assert cells(page, "plain") == ["-", "-", "4", "75.0% (30.1 to 95.4)", "-", "-", "-", "-", "3.0", "1.00"]
    judge = cells(page, "judge")
    assert judge[:4] == ["0.8", "4", "4", "50.0% (15.0 to 85.0)"]
    low, high = (100 * x for x in paired_interval(2, 0, 1, 1))  # both right twice, one lost, once neither
    assert judge[4:6] == [f"-25.0 ({low:+.1f} to {high:+.1f})", "1 / 0"]
    assert judge[6:] == [
        "2.50",
        "35.7%",
        "3.5",
        "1.17",
    ]  # 10 in 4 rounds; 5 of 14 tokens; 14 tokens in 4 s; to 3 a second
    for word in ("aaaa1111", "bbbb2222", "cccc3333"):
        assert word in page


def test_the_page_is_one_file_and_results_stay_text(tmp_path):
    page = make(tmp_path)
    assert not re.findall(
        r"(?:src|href)\s*=\s*[\"']?(?!#)[^\"'#>\s]*//|@import|url\(", page.replace(json.dumps(EVIL)[1:-1], "")
    )
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    assert "default-src 'none'" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["items"][3]["q"] == RECORDS[6]["question"] and EVIL in data["pieces"]
    evil_rule = [record("a<b>&'\"", 0, True, ["x"], "t")]
    page = make(tmp_path, evil_rule, HEADER | {"questions": EVIL})
    assert "a<b>" not in page and EVIL not in page and html.escape(EVIL) in page


def test_figures_hold_the_points(tmp_path):
    page = make(tmp_path)
    titles = [html.unescape(title) for title in re.findall("<title>(.*?)</title>", page)]
    assert "judge: 50.0% right, 15.0% to 85.0%, m* 2.50" in titles
    # rounds of 5, 2, 1 and 2 accepted tokens
    assert [
        f"judge: {share} of rounds accepted {n}" in titles
        for n, share in ((1, "25.0%"), (2, "50.0%"), (3, "0.0%"), (5, "25.0%"))
    ] == [True] * 4
    assert "judge: 35.7% by the rule alone" in titles and "plain: 100.0% the target's own" in titles
    assert "judge: 7.1% own, after full acceptance" in titles


def test_without_details_it_says_so(tmp_path):
    bare = [{k: v for k, v in r.items() if k not in ("p", "kl", "score", "top")} for r in RECORDS]
    assert "8 of 8 answers come without probability" in make(tmp_path, bare) and "--details" in make(
        tmp_path, bare
    )
    older = [{k: v for k, v in r.items() if k not in ("origin", "cuts")} for r in bare]
    page = make(tmp_path, older)
    assert "8 of 8 answers do not say who accepted" in page and "Accepted tokens a round" not in page
    assert "come without" not in make(tmp_path) and "not coloured" not in make(tmp_path)


def test_answers_that_nobody_scores(tmp_path):
    page = make(tmp_path, [r | {"right": None, "final_answer": None} for r in RECORDS])
    assert cells(page, "judge")[3:6] == ["-", "-", "-"] and "Right answers" not in page


def test_answers_of_several_turns(browser, tmp_path):
    """A turn may end with an accepted token; the next one begins a round of its own."""
    one = record("judge", 0, None, ["Hi", " there", "Bye", " now"], "aaat") | {
        "turns": [{"new_tokens": 2}, {"new_tokens": 2}]
    }
    assert "judge: 50.0% of rounds accepted 2" in make(tmp_path, [one]) and "100.0% of rounds" not in make(
        tmp_path, [one]
    )
    browser.open(f"file://{tmp_path}/report.html")
    assert browser.js("[...document.querySelectorAll('.turn')].map((s) => s.textContent)") == ["Bye"]


def test_broken_files_are_one_sentence(tmp_path, capsys):
    good = [json.dumps(line) for line in [HEADER, *RECORDS]]
    out = tmp_path / "report.html"
    for lines, word in (
        (["{"], "line 1 is not valid JSON"), (good[1:], "no header"), (["[]"], "no header"), ([], "no header"), (good[:1], "no answers"),
        ([*good[:2], good[1]], "line 3: item 0 was answered by plain before"), ([good[0], "3"], "line 2: field 'rule'"),
        ([good[0], json.dumps(RECORDS[0] | {"right": "yes"})], "field 'right'"),
        ([good[0], json.dumps(RECORDS[0] | {"origin": "ttt"})], "'origin' must hold one entry for each of the 4 tokens"),
        ([good[0], json.dumps(RECORDS[0] | {"origin": "ttx<"})], "letters a, r, t and b"),
        ([good[0], json.dumps(RECORDS[0] | {"p": [1, 2, "3", 4]})], "'p' holds what is no number"),
        ([good[0], json.dumps(RECORDS[0] | {"kl": [1, 2, float("nan"), 4]})], "'kl' holds what is no number"),
        ([good[0], json.dumps(RECORDS[0] | {"turns": [{"new_tokens": 3}]})], "'turns' must name new_tokens that add up to the 4"),
        ([good[0], json.dumps(RECORDS[0] | {"turns": [3]})], "'turns' must name"),
        ([good[0], json.dumps(RECORDS[0] | {"top": [1, 2, 3, 4]})], "'top' holds what is no text"),
        ([good[0], json.dumps(RECORDS[0] | {"cuts": [1, 1, 1, 1]})], "add up to the 12 characters"),
    ):  # fmt: skip
        (tmp_path / "r.jsonl").write_text("".join(line + "\n" for line in lines))
        with pytest.raises(SystemExit) as stop:
            report.main([str(tmp_path / "r.jsonl"), "--out", str(out)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1, err
    for flags, word in (([str(tmp_path / "none.jsonl")], "There is no file"), ([str(tmp_path)], "is a folder"), ([__file__], "line 1 is not"),
                        ([str(write(tmp_path / "r.jsonl")), "--out", "/no/such/folder/x"], "cannot be written"),
                        ([str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "r.jsonl")], "would be lost")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            report.main([*flags, *([] if "--out" in flags else ["--out", str(out)])])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1, err
    assert not out.exists() and read_run(tmp_path / "r.jsonl")[1] == RECORDS


def refused(argv: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        report.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


WRONG = (
    [],
    {},
    True,
    -1,
    1.5,
    10**18,
    float("nan"),
    float("inf"),
    "text",
    [[]],
    [True],
    [10**18],
    {"a": [1]},
)


@pytest.mark.parametrize("field", sorted({*RECORDS[1], "turns", "item"}))
def test_no_field_of_an_answer_can_break_the_page(field, tmp_path, capsys):
    """Each field, missing or of each wrong kind: a page, or one sentence that names file, line and field."""
    out, refusals = tmp_path / "report.html", 0
    for value in (*WRONG, None, ...):
        spoilt = {name: x for name, x in RECORDS[1].items() if name != field} | (
            {} if value is ... else {field: value}
        )
        path = write(tmp_path / "r.jsonl", [RECORDS[0], spoilt])
        try:
            report.main([str(path), "--out", str(out)])
            page = out.read_text(encoding="utf-8")
            assert "NaN" not in page.split('id="data">')[1] and "Infinity" not in page.split('id="data">')[1]
        except SystemExit as stop:
            err = capsys.readouterr().err
            refusals += 1
            assert stop.code == 2 and err.count("\n") == 1 and f"{path}, line 3" in err and "field" in err, (
                value,
                err,
            )
    assert refusals >= (0 if field in ("prompt",) else 3), refusals


def test_answers_that_do_not_go_together(tmp_path, capsys):
    out = ["--out", str(tmp_path / "report.html")]
    for records, words in (
        ([RECORDS[0], RECORDS[2] | {"right": None}], "line 3: field 'right'"),
        ([RECORDS[1] | {"rounds": 0}], "field 'rounds' is 0"), ([RECORDS[1] | {"accepted_by_rule": 9}], "'accepted_by_rule' is 9"),
        ([RECORDS[0] | {"seconds_decode": 0}], "took no time"), ([RECORDS[0] | {"answer_right": None}], "'answer_right'"),
        ([RECORDS[0] | dict.fromkeys(("tokens", "cuts", "p", "kl", "score", "top"), []) | {"text": "", "origin": ""}], "hold no tokens"),
    ):  # fmt: skip
        assert words in refused([str(write(tmp_path / "r.jsonl", records)), *out], capsys), words
    for header, words in (
        ({"target": [[[[1]]]]}, "'target'"),
        ({"x": float("nan")}, "'x'"),
        ({"x": {"a": [float("inf")]}}, "'x'"),
    ):
        assert words in refused([str(write(tmp_path / "r.jsonl", RECORDS, HEADER | header)), *out], capsys)
    for line in ("[" * 10**5, '{"a": 1' + "0" * 5000 + "}", '"\\ud800"', "\udcff"):
        (tmp_path / "r.jsonl").write_bytes(
            (json.dumps(HEADER) + "\n" + line + "\n").encode(errors="surrogateescape")
        )
        assert "r.jsonl" in refused([str(tmp_path / "r.jsonl"), *out], capsys)


def test_what_is_read_and_written_is_regular(tmp_path, capsys):
    """A loop of links, devices and pipes are named and left alone; a name that is no UTF-8 is shown as far as it can be."""
    good = write(tmp_path / "r.jsonl")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/full", tmp_path / "loop", tmp_path / "fifo", "n" * 300):
        assert str(path)[:50] in refused([str(path), "--out", str(tmp_path / "x.html")], capsys)
        assert "cannot be written" in refused([str(good), "--out", str(path)], capsys)
    (tmp_path / "link").symlink_to("r.jsonl")
    assert "would be lost" in refused([str(good), "--out", str(tmp_path / "link")], capsys)
    odd = tmp_path / "r\udcff.jsonl"
    good.rename(odd)
    report.main([str(odd), "--out", str(tmp_path / "page\udcff.html")])
    assert "Run of r\ufffd.jsonl" in (tmp_path / "page\udcff.html").read_text(encoding="utf-8")
    with open("/dev/full", "w") as full:
        command = [sys.executable, report.__file__, os.fsencode(odd), "--out", str(tmp_path / "x.html")]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1


def test_failed_answers_are_shown_as_such(tmp_path):
    """As evaluate.py records them: no token, no time. A rule may have no others."""
    nothing = dict.fromkeys(("tokens", "cuts"), []) | dict.fromkeys(
        ("rounds", "drafted", "accepted", "accepted_by_rule", "seconds_decode"), 0
    )
    failed = {k: v for k, v in RECORDS[1].items() if k not in ("p", "kl", "score", "top")} | nothing
    failed |= {
        "text": "",
        "origin": "",
        "right": False,
        "answer_right": False,
        "failed": "Logits are <not> finite.",
    }
    page = make(tmp_path, [RECORDS[0], failed])
    assert (
        "1 of 2 answers failed and count as wrong, the first that of judge to item 0: Logits are &lt;not&gt; finite."
        in page
    )
    assert (
        "(no answer: Logits are \\u003cnot> finite.)" in page
        and "not coloured" not in page
        and "come without" not in page
    )


def test_the_page_says_how_the_run_was_made(tmp_path):
    made = {
        "command": "python scripts/evaluate.py --limit 4",
        "machine": "2 cores",
        "commit": "abc1234",
        "date": "2026-11-25",
    }
    page = make(tmp_path, RECORDS, HEADER | made)
    assert re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page)[:4] == [
        (name, made[name]) for name in ("command", "date", "machine", "commit")
    ]
    assert "does not say" not in page and "file last written" not in page
    path = write(tmp_path / "r.jsonl")
    os.utime(path, (1.7e9, 1.7e9))
    report.main([str(path), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert (
        "<dt>file last written</dt><dd>2023-11-1" in page and "does not say: command, machine, commit" in page
    )


def test_every_figure_has_a_legend_and_names_its_axes(tmp_path):
    figures = re.findall("<figure>.*?</figure>", make(tmp_path), re.S)
    legends = [
        re.sub("<[^>]*>", "", legend).strip()
        for legend in re.findall('class="legend">(.*?)</ul>', "".join(figures))
    ]
    assert [legend.split() for legend in legends[:2]] == [
        ["judge", "plain"],
        ["judge"],
    ] and "r: by the rule alone" in legends[2]
    assert (
        len(legends) == len(figures) == 3
        and "right answers, %" in figures[0]
        and "share of the rounds, %" in figures[1]
    )
    assert ">0.8</text>" in figures[0]  # the point's threshold


def test_the_commands_of_the_documents(tmp_path, monkeypatch, capsys):
    texts = [(ROOT / "docs" / "evaluation.md").read_text(), report.__doc__]
    commands = [
        line.split()
        for text in texts
        for line in re.findall(r"^ *python scripts/report.py (\S[^#\n]*)", text, re.M)
    ]
    assert commands == [["results.jsonl", "--out", "report.html"]] * 2
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results.jsonl")
    report.main(commands[0])
    assert (tmp_path / "report.html").exists() and "8 answers to 4 questions" in capsys.readouterr().out


def test_a_killed_runs_half_line_is_left_out_with_a_note(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl")
    path.write_text(path.read_text()[:-9])
    assert len(read_run(path)[1]) == 7 and "cut off" in capsys.readouterr().err
    path.write_text(json.dumps(HEADER))
    with pytest.raises(InputError, match="no header"):
        read_run(path)


def test_a_run_of_500_items_and_3_rules_stays_small(tmp_path):
    """With answers of 200 tokens and figures that are all different, a quarter of them by the rule alone."""
    words, origin, irregular = (
        [f" word{n}" for n in range(200)],
        "rata" * 50,
        [(n * 0.6180339887) % 1 for n in range(200)],
    )
    one = record("judge", 0, True, words, origin, p=iter(irregular), score=irregular)
    one |= {"kl": [4 * x for x in irregular], "p": irregular, "question": "What? " * 50}
    page = make(
        tmp_path, [one | {"index": n, "rule": f"judge={rule}"} for n in range(500) for rule in range(3)]
    )
    assert len(page.encode()) < 10e6


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    if sys.platform != "linux":
        pytest.skip("the pipe to the browser is made for Linux")
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """Opens the page of RECORDS at a view of it, and gives the browser."""
    folder = tmp_path_factory.mktemp("page")
    make(folder)

    def view(address: str = "") -> Browser:
        browser.open(f"file://{folder}/report.html{address}")
        assert browser.asked == [browser.asked[0]] and not browser.problems
        return browser

    return view


def shown(browser: Browser) -> list[str]:
    """item:rule of every answer on the page."""
    return browser.js("[...document.querySelectorAll('#items section')].map((s) => s.closest('article').dataset.item + ':'"
                      " + s.querySelector('h4').textContent.trim().split(' ')[0])")  # fmt: skip


def test_the_address_filters(page):
    everything = [f"{item}:{rule}" for item in range(4) for rule in ("plain", "judge")]
    for address, expected in (
        ("", everything), ("#rule=judge", everything[1::2]), ("#right=1", ["0:plain", "1:plain", "1:judge", "3:plain", "3:judge"]),
        ("#wrong=1", ["0:judge", "2:plain", "2:judge"]), ("#lost=1", ["0:judge"]), ("#only=rule", ["0:judge", "1:judge", "3:judge"]),
        ("#rule=judge&wrong=1&only=rule", ["0:judge"]), ("#q=SUM", ["0:plain", "0:judge"]), ("#q=question%201", ["1:plain", "1:judge"]),
        ("#wrong=1&rule=judge&only=rule&all=1", ["0:plain", "0:judge"]), ("#item=2", ["2:plain", "2:judge"]), ("#q=nowhere", []),
        ("#rule=unknown", everything), ("#q=%3Cimg", ["3:plain", "3:judge"]),
    ):  # fmt: skip
        found = page(address)
        assert shown(found) == expected, address
        if "all=1" not in address:
            assert found.js("document.getElementById('status').textContent").startswith(
                f"{len(expected)} of 8 answers,"
            )
    assert found.js("document.title") == "Run of results.jsonl"  # nothing of EVIL has run


def test_results_are_text_in_the_browser(page):
    found = page("#item=3&rule=judge")
    assert found.js("document.querySelector('.question').textContent") == EVIL
    assert found.js("[...document.querySelectorAll('.text span')].map((s) => s.textContent)") == [
        EVIL,
        "é\n",
        "🙂",
    ]
    assert found.js("document.title") == "Run of results.jsonl"
    assert found.js("document.querySelectorAll('img').length") == 0
    found.js(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
    )
    assert found.js("document.title") == "Run of results.jsonl"  # the page's policy lets no other script run


def test_controls_filter_and_write_the_address(page):
    found = page()
    found.js(
        "(() => { const s = document.getElementById('rule'); s.value = 1; s.dispatchEvent(new Event('change')); })()"
    )
    found.mouse("#only", click=True)
    assert (
        shown(found) == ["0:judge", "1:judge", "3:judge"]
        and found.js("location.hash") == "#rule=judge&only=rule"
    )
    found.mouse("#q", click=True)
    for letter in "five":
        found.key(letter)
    found.until("document.querySelectorAll('#items section').length === 1")
    assert shown(found) == ["1:judge"] and found.js("location.hash") == "#rule=judge&only=rule&q=five"
    found.mouse("#reset", click=True)
    assert len(shown(found)) == 8 and found.js("document.getElementById('q').value") == ""
    found.js("location.hash = '#wrong=1'")
    found.until("document.querySelectorAll('#items section').length === 3")
    assert found.js("document.getElementById('result').value") == "wrong"


def rows(found: Browser) -> list[list[str]]:
    return found.js(
        "[...document.querySelectorAll('#tokens tr')].map((r) => [...r.children].map((c) => c.textContent.trim()))"
    )


def test_the_spot_check_lists_the_rules_tokens_most_doubtful_first(page):
    found = page()
    assert [row[0] for row in rows(found)] == [
        "item 0, token 4", "item 1, token 2", "item 0, token 1", "item 3, token 1", "item 3, token 2"]  # fmt: skip
    assert rows(found)[0] == [
        "item 0, token 4",
        "judge",
        "✗ wrong",
        "…So the sum is 8…",
        '" other"',
        "0.010",
        "1.500",
        "0.875",
    ]
    assert found.js("document.getElementById('spot-status').textContent") == "5 tokens in 3 answers"
    assert rows(page("#sort=score"))[0][0] == "item 1, token 2"  # the one with a score of 0.6
    assert [row[0] for row in rows(page("#wrong=1"))] == ["item 0, token 4", "item 0, token 1"]
    assert (
        page("#rule=plain").js("document.getElementById('spot-status').textContent")
        == "No such token in these answers."
    )
    found = page()
    found.mouse("#tokens a", click=True)
    found.until("document.querySelector('.here')")
    assert shown(found) == ["0:judge"]
    assert found.js("[document.querySelector('.here').textContent, document.activeElement.textContent]") == [
        " is",
        " is",
    ]


def test_figures_of_a_token_by_mouse_keys_and_touch(page):
    tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    found = page("#item=0&rule=judge")
    assert found.js(tip) == ""
    found.mouse("[data-at='3']")
    text = found.js(tip)
    for part in (
        '" is": let through by the rule alone',
        "probability 0.010",
        "KL(target, draft) 1.500",
        "score 0.875",
        '" other"',
    ):
        assert part in text
    found.mouse("h1")
    assert found.js(tip) == ""
    found.js("document.querySelector('.text span').focus()")
    assert "probability 0.300" in found.js(tip)
    at = "document.activeElement.dataset.at"
    for key, expected in (
        ("ArrowRight", "1"),
        ("ArrowRight", "2"),
        ("ArrowLeft", "1"),
        ("n", "3"),
        ("p", "0"),
        ("End", "5"),
        ("Home", "0"),
    ):
        found.key(key)
        assert found.js(at) == expected, key
    assert (
        found.js("document.querySelectorAll('.text [tabindex=\"0\"]').length") == 1
    )  # one stop of Tab an answer
    assert found.js("document.activeElement.getAttribute('aria-describedby')") == "tip"
    found.key("Escape")
    assert found.js(tip) == ""
    found.call("Emulation.setTouchEmulationEnabled", enabled=True)
    found.js("document.querySelector(\"[data-at='4']\").scrollIntoView({ block: 'center' })")
    found.js(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
    )  # scroll bars have gone
    x, y = found.js(
        "(() => { const b = document.querySelector(\"[data-at='4']\").getBoundingClientRect(); return [b.x + 5, b.y + 5]; })()"
    )
    found.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    found.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    found.until(f"window.seen = {tip}")  # at once: on a busy machine a late scroll may hide it again
    said = found.js("window.seen")
    assert '" 8": accepted: the target agrees' in said and "KL(target, draft) 0.000" in said
    assert (
        found.js("document.querySelector('.text [tabindex=\"0\"]').dataset.at") == "4"
    )  # Tab comes back to it
    found.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_kinds_differ_in_more_than_colour_and_stay_readable(page):
    """By underline; text against its background at least 4.5 : 1 (WCAG AA), light and dark."""
    for scheme in ("light", "dark"):
        found = page()
        found.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        look = found.js("[...'artb'].map((c) => getComputedStyle(document.querySelector('#answers p .' + c))).map((s) => "
                        "[s.textDecorationLine + s.textDecorationStyle, s.color, s.backgroundColor])")  # fmt: skip
        look += found.js("['.soft', 'article .right', 'article .wrong', 'article .question', 'a'].map((q) => ['', "
                         "getComputedStyle(document.querySelector(q)).color, getComputedStyle(document.body).backgroundColor])")  # fmt: skip
        assert len({kind for kind, _, _ in look[:4]}) == 4
        for _, *colours in look:
            light = sorted(luminance([int(x) for x in re.findall(r"\d+", colour)[:3]]) for colour in colours)
            assert (light[1] + 0.05) / (light[0] + 0.05) >= 4.5, (scheme, colours)
        assert (luminance([int(x) for x in re.findall(r"\d+", look[-1][2])[:3]]) > 0.5) == (scheme == "light")
    found.call("Emulation.setEmulatedMedia", features=[])


def luminance(rgb: list[int]) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    r, g, b = ((c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4) for c in (x / 255 for x in rgb))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_items_are_built_as_they_are_needed(browser, tmp_path):
    many = [record("judge", n, True, [f"w{n}", " x"] * 10, "rt" * 10, p=[0.1] * 10) for n in range(300)]
    make(tmp_path, many)
    browser.open(f"file://{tmp_path}/report.html")
    count = "[document.querySelectorAll('article').length, document.querySelectorAll('#tokens tr').length]"
    assert browser.js(count) == [20, 20]
    assert browser.js("document.getElementById('spot-status').textContent") == "3000 tokens in 300 answers"
    browser.js("document.getElementById('more-tokens').click()")
    assert browser.js(count)[1] == 40
    browser.js("document.getElementById('more-items').scrollIntoView()")
    browser.until("document.querySelectorAll('article').length > 20")  # the end of the list came into view
    browser.js("location.hash = '#item=299&rule=judge&at=18'")  # a place far down is found at once
    browser.until("document.querySelector('.here')")
    assert browser.js(
        "[document.activeElement.textContent, document.querySelectorAll('article').length]"
    ) == ["w299", 1]


def test_a_page_without_details_works(browser, tmp_path):
    make(tmp_path, [{k: v for k, v in r.items() if k not in ("p", "kl", "score", "top")} for r in RECORDS])
    browser.open(f"file://{tmp_path}/report.html#item=0&rule=judge")
    browser.mouse("[data-at='3']")
    assert "no figures; run evaluate.py with --details" in browser.js(
        "document.getElementById('tip').textContent"
    )
    assert rows(browser)[0][5:] == ["-", "-", "-"] and not browser.problems
    make(
        tmp_path,
        [
            {k: v for k, v in r.items() if k not in ("p", "kl", "score", "top", "origin", "cuts")}
            for r in RECORDS
        ],
    )
    browser.open(f"file://{tmp_path}/report.html#item=0&rule=judge")
    assert (
        browser.js("document.querySelector('.text').textContent") == "So the sum is 8"
        and not browser.problems
    )


@pytest.fixture
def narrow(browser):
    def width(pixels: int) -> None:
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=pixels,
            height=800,
            deviceScaleFactor=1,
            mobile=pixels < 500,
        )

    yield width
    browser.call("Emulation.clearDeviceMetricsOverride")


BAR = "document.querySelector('.filters').getBoundingClientRect()"


@pytest.mark.parametrize("pixels", [400, 1200])
def test_every_part_is_in_view_at_every_width(page, narrow, pixels):
    """Nothing lies beside the screen, the spot check's token and figures included, and no heading under the bar."""
    narrow(pixels)
    page()  # else the link below would be the first address
    for view in ("summary", "figures", "spot", "answers"):
        found = page(f"#view={view}")
        assert found.js("document.documentElement.scrollWidth <= innerWidth")
        top, above, below = found.js(
            f"[document.querySelector('#{view} h2').getBoundingClientRect().top, {BAR}.top, {BAR}.bottom]"
        )
        assert 0 <= top < 800 and (top >= below or top < above), (view, top, above, below)
    cells = page("#view=spot").js("[...document.querySelectorAll('#tokens tr:first-child td')].map((c) => { const b = c.getBoundingClientRect();"
                                  "return [b.left, b.right, b.width]; })")  # fmt: skip
    assert len(cells) == 8 and all(
        left >= 0 and right <= pixels and width > 0 for left, right, width in cells
    )
    top, below = page("#item=0&rule=judge&at=3").js(
        f"[document.querySelector('.here').getBoundingClientRect().top, {BAR}.bottom]"
    )
    assert top >= below


def test_on_a_narrow_screen_the_token_comes_first_and_figures_keep_their_names(page, narrow):
    narrow(400)
    found = page("#view=spot")
    tops = found.js(
        "[...document.querySelectorAll('#tokens tr:first-child td')].map((c) => c.getBoundingClientRect().top)"
    )
    assert tops[3] == min(tops) and tops.count(tops[3]) == 1
    names = found.js(
        "[...document.querySelectorAll('#tokens tr:first-child td')].map((c) => getComputedStyle(c, '::before').content)"
    )
    assert [name == "none" for name in names] == [True] * 4 + [False] * 4
    assert found.js("[...document.querySelectorAll('#tokens tr:first-child td[data-name]')].map((c) => c.dataset.name)") == [
        "the target's own", "probability", "KL divergence", "score"]  # fmt: skip
