"""Protects: the exact bound, that a walk keeps it and picking the best does not, what is counted, what is written."""

import functools
import itertools
import json
import math
import os
import random

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save

import judge
from cli import InputError
from scripts import calibrate
from scripts.lib import answers, calibration, guarantee, terminal
from scripts.lib.calibration import figures, fixed_sequence, is_harmed, least_n, most_harms
from scripts.lib.intervals import upper_bound
from scripts.lib.scoring import Question

DEMO = ROOT / "checkpoints" / "demo"


def test_the_bound_is_clopper_pearsons():
    for n in (10, 59, 300):  # without harm: 1 - (1 - confidence)^(1/n)
        assert upper_bound(0, n, 0.95) == pytest.approx(1 - 0.05 ** (1 / n), abs=1e-9)
    # Clopper and Pearson 1934: 95% two-sided for 1 of 20 ends at 0.2487, for 5 of 50 at 0.2181
    assert upper_bound(1, 20, 0.975) == pytest.approx(0.2487, abs=1e-4)
    assert upper_bound(5, 50, 0.975) == pytest.approx(0.2181, abs=1e-4)
    assert upper_bound(7, 7, 0.9) == 1.0


def test_the_bound_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for harms, n, confidence in (
        (0, 5, 0.9),
        (3, 400, 0.95),
        (17, 90, 0.99),
        (250, 1319, 0.95),
        (2, 20000, 0.999),
    ):
        assert upper_bound(harms, n, confidence) == pytest.approx(
            stats.beta.ppf(confidence, harms + 1, n - harms), rel=1e-6
        )


def test_most_harms_is_the_last_that_qualifies():
    for n, max_harm in ((59, 0.05), (58, 0.05), (400, 0.02), (149, 0.02), (148, 0.02)):
        most = most_harms(n, max_harm, 0.95)
        assert most == -1 or upper_bound(most, n, 0.95) <= max_harm
        assert upper_bound(most + 1, n, 0.95) > max_harm
    assert most_harms(59, 0.05, 0.95) == 0 and most_harms(58, 0.05, 0.95) == -1


def test_a_walk_stops_at_the_first_failure_and_never_looks_beyond():
    asked = []

    def harms_at(threshold, limit):
        asked.append(threshold)
        return {0.9: 0, 0.8: 3, 0.7: 4, 0.6: 0}[threshold]

    assert fixed_sequence([0.9, 0.8, 0.7, 0.6], harms_at, 400, 0.02, 0.95) == [
        (0.9, 0),
        (0.8, 3),
    ]  # 4 of 400 is above 2%
    assert asked == [0.9, 0.8, 0.7]
    assert (
        fixed_sequence([0.9], harms_at, 100, 0.02, 0.95) == []
    )  # 100 questions cannot show 2%, even without harm
    assert figures([], 100, 0.95)["threshold"] is None


def chance(harms: range, n: int, share: float) -> float:
    """How likely it is that so many of n are harmed, where each is with the chance `share`."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in harms)


@pytest.fixture
def quick_limit(monkeypatch):
    """The same limit for the same numbers, looked for once."""
    monkeypatch.setattr(calibration, "most_harms", functools.cache(most_harms))


@pytest.mark.parametrize("n, max_harm, confidence", [(400, 0.05, 0.9), (59, 0.05, 0.95)])
def test_the_walk_keeps_its_confidence_and_picking_the_best_does_not(quick_limit, n, max_harm, confidence):
    """Exactly, over all that can come out: how often the threshold chosen has a true harm above max_harm, by the walk,
    and by picking the loosest threshold whose own bound is within max_harm. Harm at each threshold is drawn apart,
    which makes picking worst."""
    true = [0.9 * max_harm] + [1.1 * max_harm] * 7  # all but the first are above
    limit = most_harms(n, max_harm, confidence)
    passes = [chance(range(limit + 1), n, share) for share in true]
    walked = picked = total = 0.0
    for outcome in itertools.product((True, False), repeat=len(true)):
        likely = math.prod(p if within else 1 - p for p, within in zip(passes, outcome))
        total += likely
        harms = [limit if within else limit + 1 for within in outcome]
        passed = fixed_sequence(
            list(range(len(true))), lambda t, _, harms=harms: harms[t], n, max_harm, confidence
        )
        walked += likely * bool(passed and true[passed[-1][0]] > max_harm)
        within = [t for t in range(len(true)) if outcome[t]]
        picked += likely * bool(within and true[within[-1]] > max_harm)
    assert total == pytest.approx(1) and 0 < walked <= 1 - confidence
    assert picked > 2 * (1 - confidence), "picking without the test would be as good: this shows nothing"


@pytest.mark.parametrize("n, max_harm, confidence", [(400, 0.05, 0.9), (59, 0.05, 0.95), (250, 0.02, 0.99)])
def test_at_the_edge_the_walk_fails_as_often_as_it_may(quick_limit, n, max_harm, confidence):
    """A rule whose first threshold is just above the bound passes almost 1 - confidence of the time: one harm more that
    were let through would be too many."""
    passing = [k for k in range(n + 1) if fixed_sequence([1], lambda *_, k=k: k, n, max_harm, confidence)]
    assert passing == list(range(len(passing)))  # few harms pass, many do not
    assert 0 < chance(range(len(passing)), n, max_harm * 1.0001) <= 1 - confidence
    assert chance(range(len(passing) + 1), n, max_harm * 1.0001) > 1 - confidence


def command(tmp_path, *more: str) -> list[str]:
    return ["--answers", str(tmp_path / "answers.jsonl"), "--device", "cpu", "--seed", "5", *more]


@pytest.fixture
def scripted(monkeypatch):
    """Answers without decoding: plain is right but on questions 0 and 1; topk K harms questions 2 to K and mends 0."""

    class Bench:
        models, prompts, answered = (None, None, None), {}, []

        def __init__(self, args, questions, needs_judge, largest_k=0):
            self.args = args

        def engine(self, rule):
            return None

        def answer(self, question, rule):
            self.answered.append((rule.name, rule.threshold, question.index))
            harmed = range(2, int(rule.threshold or 0) + 1)
            right = question.index not in ((0, 1) if rule.name == "plain" else (1, *harmed))
            return {"right": right, "tokens": [1, 2, 3, 4], "accepted_by_rule": question.index % 2, "mean_score": None,
                    "accepted": 6, "rounds": 2}  # fmt: skip

    monkeypatch.setattr(calibration, "Bench", Bench)
    monkeypatch.setattr(calibration, "conditions", lambda *args: {"verify": "topk"})
    return Bench


def test_harm_is_what_plain_has_right_and_the_rule_wrong(tmp_path, scripted, capsys):
    out = tmp_path / "topk.json"
    calibrate.main(command(tmp_path, "--verify", "topk", "--max_harm", "0.05", "--limit", "150", "--walk", "1,2,3,4,5,9",
                           "--out", str(out)))  # fmt: skip
    found = json.loads(out.read_text())
    # of 150, 3 may be harmed for 5% (upper bound 5.08% at 3? then 2): K = 2 harms 1, K = 3 harms 2, K = 4 harms 3
    limit = most_harms(150, 0.05, 0.95)
    assert limit == 2 and (found["threshold"], found["harms"], found["passed"]) == (3.0, 2, [1.0, 2.0, 3.0])
    assert found["bound"] == upper_bound(2, 150, 0.95) and found["n"] == 150 and found["plain_right"] == 148
    assert found["live"]["by_rule"][0] == pytest.approx(0.125) and found["mean_accepted"] == 3.0
    assert not any(threshold == 5.0 for _, threshold, _ in scripted.answered), (
        "it looked beyond the first failure"
    )
    guarantee.read_calibration(out)


def test_a_run_in_which_nothing_can_be_harmed_earns_nothing(tmp_path, scripted, capsys, monkeypatch):
    """Answers that are cut off, or a checker that is wrong for them: plain is never right, so no rule ever harms."""
    monkeypatch.setattr(scripted, "answer", lambda self, question, rule: {"right": False})
    out = tmp_path / "topk.json"
    with pytest.raises(SystemExit) as stop:
        calibrate.main(
            command(tmp_path, "--verify", "topk", "--max_harm", "0.3", "--limit", "50", "--out", str(out))
        )
    assert (
        stop.value.code == 2
        and "none of these questions right" in capsys.readouterr().err
        and not out.exists()
    )


@pytest.mark.parametrize(
    "plain, ours, harmed",
    [  # (right, how it stopped) of plain decoding and of the rule
        ((True, "stop"), (True, "stop"), False), ((True, "stop"), (False, "stop"), True),
        ((False, "stop"), (False, "stop"), False), ((False, "stop"), (False, "length"), False),
        ((True, "stop"), (False, "length"), True), ((True, "stop"), (True, "length"), True),  # it might yet go wrong
        ((False, "length"), (False, "stop"), True), ((False, "length"), (True, "stop"), False),  # plain might yet be right
        ((False, "length"), (False, "length"), True), ((True, "length"), (False, "stop"), True),
        ((False, "failed"), (False, "stop"), True), ((True, "stop"), (False, "failed"), True),
        ((False, "failed"), (True, "stop"), False), ((False, "failed"), (False, "failed"), True),
    ],
)  # fmt: skip
def test_what_was_cut_off_or_failed_never_makes_a_bound_better(plain, ours, harmed):
    records = [
        {"right": right, "stop_reason": reason, "text": "It is 7. Question: next"}
        for right, reason in (plain, ours)
    ]
    assert is_harmed(Question(0, "", "", "number"), *records) is harmed
    ended = [
        record | {"stop_reason": "stop"} for record in records
    ]  # a base model's answer ends where the next question begins
    fewshot = Question(0, "", "", "number", stops=("Question:",))
    assert is_harmed(fewshot, *records) is is_harmed(fewshot, *ended)


def test_answers_that_are_cut_off_count_against_the_bound(tmp_path, scripted, capsys, monkeypatch):
    """Of 150, K = 1 harms none; but where 3 of its answers are cut off, no threshold qualifies at 5%; with 2 it does."""
    answer = scripted.answer
    for cut, code in ((3, 1), (2, 0)):

        def cut_off(self, question, rule, cut=cut):
            more = (
                {"stop_reason": "length", "text": ""}
                if rule.name == "topk" and 20 <= question.index < 20 + cut
                else {}
            )
            return answer(self, question, rule) | more

        monkeypatch.setattr(scripted, "answer", cut_off)
        out = tmp_path / "topk.json"
        argv = command(
            tmp_path,
            "--verify",
            "topk",
            "--max_harm",
            "0.05",
            "--limit",
            "150",
            "--walk",
            "1",
            "--out",
            str(out),
        )
        if code:
            with pytest.raises(SystemExit) as stop:
                calibrate.main(argv)
            assert stop.value.code == 1 and not out.exists()
            assert "of them because an answer was cut off or failed" in capsys.readouterr().err
        else:
            calibrate.main(argv)
            found = guarantee.read_calibration(out)
            assert (found["harms"], found["cut_off"]) == (2, 2)
            assert (
                found["questions"] == "demo"
                and len(found["examples"]) == 3
                and max(map(len, found["examples"])) <= 100
            )


def test_too_few_questions_are_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    """149, 236 and 313 questions show 2% with 95% confidence without, with one, with two harms (Clopper-Pearson)."""
    monkeypatch.setattr(calibration, "Bench", lambda *args: pytest.fail("loaded all the same"))
    with pytest.raises(SystemExit) as stop:
        calibrate.main(
            command(tmp_path, "--max_harm", "0.02", "--limit", "60", "--out", str(tmp_path / "j.safetensors"))
        )
    assert stop.value.code == 1
    assert "on 60 (without a single harm it takes 149, with one 236, with two 313)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for harms, n in ((0, 149), (1, 236), (2, 313)):
        assert (
            least_n(harms, 0.02, 0.95) == n
            and most_harms(n, 0.02, 0.95) == harms == most_harms(n - 1, 0.02, 0.95) + 1
        )
    for max_harm, confidence in (
        (1e-6, 0.999999),
        (0.999999, 1e-6),
        (0.5, 0.5),
    ):  # the ends of what the flags allow
        for harms in range(3):
            n = least_n(harms, max_harm, confidence)
            assert upper_bound(harms, n, confidence) <= max_harm
            assert n <= harms + 1 or upper_bound(harms, n - 1, confidence) > max_harm


def test_the_same_question_twice_is_one_observation(tmp_path, capsys):
    from scripts.lib.tasks import load_questions

    lines = [{"prompt": f"What is {n} and 1?", "reference": str(n + 1)} for n in (1, 2, 1, 1)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = load_questions(str(tmp_path / "q.jsonl"), "number")
    assert [q.index for q in questions] == [0, 1] and "left out 2 questions" in capsys.readouterr().err


def test_nothing_is_written_when_no_threshold_qualifies(tmp_path, scripted, capsys):
    out = tmp_path / "topk.json"
    with pytest.raises(SystemExit) as stop:
        calibrate.main(
            command(tmp_path, "--verify", "topk", "--max_harm", "0.02", "--limit", "140", "--out", str(out))
        )
    assert (
        stop.value.code == 1
        and "No threshold of topk qualifies" in capsys.readouterr().out
        and not out.exists()
    )


def test_a_judge_is_calibrated_end_to_end_and_announces_it(tmp_path, capsys):
    """On the demo pair, few questions and a wide bound; the run resumes from its answers, and the engine says what holds."""
    import generate

    out = tmp_path / "judge.safetensors"
    flags = command(tmp_path, "--max_harm", "0.4", "--limit", "6", "--walk", "0.95,0.8", "--out", str(out))
    judge.main(["calibrate", *flags])
    first, answers = out.read_bytes(), (tmp_path / "answers.jsonl").read_bytes()
    with safe_open(out, "pt") as handle:
        header = json.loads(handle.metadata()["judge"])
    info, threshold = header["info"]["calibration"], header["threshold"]
    assert (
        info["n"] == 6 and info["conditions"]["speculate_k"] == 16 and threshold == info["threshold"] == 0.8
    )
    lines = answers.splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:50])  # as a kill leaves it
    judge.main(["calibrate", *flags])
    assert out.read_bytes() == first
    capsys.readouterr()
    for more, word in (
        ([], "\nGuarantee: with 95% confidence, at most 40% of"), (["--threshold", "0.6"], "No guarantee: calibrated for threshold 0.8"),
        (["--threshold", "0.95"], "\nGuarantee"), (["--max_new_tokens", "20"], "No guarantee: calibrated with max_new_tokens 200"),
        (["--speculate_k", "8"], "No guarantee: calibrated with speculate_k 16"), (["--temperature", "1"], "with temperature 0"),
    ):  # fmt: skip
        # a prompt, so that nothing is decoded plainly to compare
        generate.main(["--judge_path", str(out), "--device", "cpu", "--prompt", terminal.DEMO_PROMPT, *more])
        assert word in "\n" + capsys.readouterr().err, more
    # calibrated again in place: the answers are the same judge's, and still serve
    judge.main(
        [
            "calibrate",
            "--judge_path",
            str(out),
            *command(tmp_path, "--max_harm", "0.5", "--limit", "6", "--walk", "0.95,0.8"),
        ]
    )
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == len(lines)


@pytest.mark.slow
def test_the_path_from_nothing_to_a_calibrated_judge(tmp_path, capsys, monkeypatch):
    """The lines of docs/judges.md for the demo pair alone, each as it stands there but for smaller numbers."""
    import generate
    from scripts import build_judge_data, train_judge

    block = (ROOT / "docs" / "judges.md").read_text().split("```")[1]
    lines = block.replace("\\\n", "").strip().splitlines()
    mains = {
        "scripts/build_judge_data.py": build_judge_data.main,
        "scripts/train_judge.py": train_judge.main,
        "scripts/calibrate.py": calibrate.main,
        "generate.py": generate.main,
    }
    smaller = {
        "--limit 200": "--limit 6 --seed 1",
        "--limit 300": "--limit 3",
        "--max_harm 0.02": "--max_harm 0.7 --walk 0.9,0.5",
        "--compile": "",
    }
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "COMPARED", 1)
    said = []
    for line in lines:
        for written, small in smaller.items():
            line = line.replace(written, small)
        python, script, *argv = line.split()
        assert python == "python"
        mains[script](argv)
        said.append("\n".join(capsys.readouterr()))
    assert len(said) == 4 and "answers (" in said[0] and "it has no calibration yet" in said[1]
    assert "harmed with 95% confidence up to delta" in said[2] and "written to judge.safetensors" in said[2]
    assert (
        "Guarantee: with 95% confidence, at most 70% of questions like these" in said[3]
        and "(these: demo, " in said[3]
    )
    judge.main(
        ["train", "--data", "answers.jsonl", "--out", "judge.safetensors"]
    )  # a head trained anew has none
    capsys.readouterr()
    mains["generate.py"](["--judge_path", "judge.safetensors", "--max_new_tokens", "5"])
    assert "No guarantee: this judge has no calibration" in capsys.readouterr().err


def test_questions_that_the_judge_was_trained_on_are_left_out(tmp_path, capsys):
    """The demo's training problems are not those of calibration; but a head may name some of those as its own."""
    from dataclasses import replace

    from quantize import load_model
    from scripts.lib.tasks import load_questions
    from tokenizer import load_tokenizer

    tokenizer, target = load_tokenizer(DEMO / "target"), load_model(DEMO / "target", dtype=torch.float32)
    questions = load_questions("demo", None, 6, 5)
    keys = [answers.prompt_key(tokenizer.prompt(q.prompt)) for q in questions]
    head = judge.load_judge(DEMO / "judge.safetensors", target)
    assert not set(keys) & set(head.trained_on.tolist()) and len(head.trained_on) > 500
    replace(head, trained_on=torch.tensor(keys[:4])).save(tmp_path / "some.safetensors")
    flags = [
        "--judge_path",
        str(tmp_path / "some.safetensors"),
        "--max_harm",
        "0.9",
        "--confidence",
        "0.6",
        "--walk",
        "0.9",
    ]
    calibrate.main(command(tmp_path, *flags, "--limit", "6", "--out", str(tmp_path / "out.safetensors")))
    out, err = capsys.readouterr()
    assert "left out 4 questions" in err and "of 2," in out
    replace(head, trained_on=torch.tensor(keys)).save(tmp_path / "some.safetensors")
    (tmp_path / "answers.jsonl").unlink()
    with pytest.raises(SystemExit):
        calibrate.main(command(tmp_path, *flags, "--limit", "6", "--out", str(tmp_path / "out.safetensors")))
    assert "trained on all of these" in capsys.readouterr().err


def test_the_cheap_form_counts_answers_not_tokens(tmp_path, capsys, monkeypatch):
    """Answers with a wrong token that scores high are harms, once each; answers without a wrong token do not count."""
    from scripts.lib.demo_task import problems, write_answer_with_errors

    rng, lines = random.Random(0), []
    for problem, _ in zip(problems(123, held_out=True), range(12)):
        text, errors = write_answer_with_errors(problem, "target", rng, 0.4)
        lines.append(
            {"prompt": problem.question, "response": text, "errors": [list(span) for span in errors]}
        )
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wrong = sum(bool(line["errors"]) for line in lines)
    data.write_text(data.read_text() * 3)  # the same answers again are no further evidence
    flags = ["--max_false_accept", "0.9", "--confidence", "0.6", "--data", str(data), "--device", "cpu"]
    calibrate.main(
        [*flags, "--answers", str(tmp_path / "features"), "--out", str(tmp_path / "out.safetensors")]
    )
    out = capsys.readouterr().out
    assert f"of {wrong}," in out
    with safe_open(tmp_path / "out.safetensors", "pt") as handle:
        info = json.loads(handle.metadata()["judge"])["info"]["calibration"]
    assert info["kind"] == "false_accept" and info["n"] == wrong and info["harms"] <= wrong


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "Bench", lambda *args: pytest.fail("loaded all the same"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "other.safetensors").write_bytes(save({"w": torch.zeros(3)}))
    for more, word in (
        ([], "Give one of --max_harm"), (["--max_harm", "2"], "--max_harm 2 must be a number from"), (["--max_harm", "0.1", "--walk", "a"], "numbers"),
        (["--max_harm", "0.1", "--walk", "0.5,0.9"], "from the strictest delta to the loosest, which is 0.9,0.5"),
        (["--max_harm", "0.1", "--verify", "kl"], "needs --out"), (["--max_harm", "0.1", "--confidence", "1"], "--confidence 1"),
        (["--max_false_accept", "0.1"], "--data"), (["--max_harm", "0.1", "--judge_path", "/no"], "no judge file /no"),
        (["--max_harm", "0.1", "--out", "judge.json"], "name it *.safetensors"), (["--max_harm", "0.1", "--checkpoint_path", "x"], "draft"),
        (["--max_harm", "0.1", "--out", "/no/such/file.safetensors"], "cannot be written"),
        (["--max_harm", "0.1", "--speculate_k", "auto"], "fixed --speculate_k"), (["--max_harm", "0.1", "--answers", "/no/a"], "--answers /no/a"),
        (["--max_harm", "0.1", "--verify", "topk", "--out", str(DEMO / "judge.safetensors")], "--judge_path"), (["--max_harm", "0.1", "--walk", "3"], "--walk 3"),
        (["--max_harm", "nan"], "--max_harm nan"), (["--max_harm", "1e-320"], "--max_harm"), (["--max_harm", "1" * 5000], "--max_harm"),
        (["--max_harm", "0.1", "--verify", "kl", "--walk", "inf", "--out", str(tmp_path / "a")], "--walk inf"),
        (["--max_harm", "0.1", "--verify", "topk", "--walk", "1,1e999", "--out", str(tmp_path / "a")], "--walk inf"),
        (["--max_harm", "0.1", "--walk", ""], "--walk"), (["--max_harm", "0.1", "--verify", "kl", "--out", "/dev/null"], "it is a device"),
        (["--max_harm", "0.1", "--verify", "kl", "--out", str(tmp_path / "pipe")], "it is a pipe"),
        (["--max_harm", "0.1", "--out", str(tmp_path / "o.safetensors"), "--answers", str(tmp_path / "pipe")], "it is a pipe"),
        (["--max_harm", "0.1", "--out", str(tmp_path / "o.safetensors"), "--answers", str(tmp_path / "o.safetensors")], "--out itself"),
        (["--max_harm", "0.1", "--out", str(tmp_path / "o.safetensors"), "--answers", str(DEMO / "judge.safetensors")], "one of the inputs"),
        (["--max_harm", "0.1", "--out", str(DEMO / "target" / "model.safetensors")], "one of the inputs"),
        (["--max_harm", "0.1", "--out", str(tmp_path / "other.safetensors")], "is not a judge's file"),
        (["--max_harm", "0.1", "--judge_path", str(tmp_path / "pipe")], "no judge file"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            calibrate.main(["--device", "cpu", *more])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and word in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "pipe"]
    with pytest.raises(InputError):
        judge.check_threshold("judge", 0.2, "--walk")
