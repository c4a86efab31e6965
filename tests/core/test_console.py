import json

import pytest

from prunegraph.core import console as module
from prunegraph.core.console import Console, seconds_in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.21, "4.2 s"), (42.4, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words


def test_json_goes_alone_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json_only=True)
    console.say("progress")
    console.result({"a": 1})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == "progress\n"


def test_words_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("[bold] is not markup")
    console.result({"a": 1})
    captured = capsys.readouterr()
    assert captured.out == "[bold] is not markup\n"
    assert captured.err == ""


def test_plain_progress_says_the_time_left_and_does_not_flood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    with Console().progress("search", 4) as report:
        for step in range(1, 5):
            report(step, "best 0.9")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "search: 2/4, 20 s, 20 s left, best 0.9",
        "search: 4/4, 40 s, best 0.9",
    ]


def test_plain_progress_within_long_steps_gets_rarer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 100.0, 110.0, 4000.0, 4070.0, 4090.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    with Console().progress("fine-tune", 4) as report:
        for completed in (0.5, 0.55, 2.0, 2.25, 2.5):
            report(completed)
    assert capsys.readouterr().out.splitlines() == [
        "fine-tune: 0.5/4, 1 min 40 s",
        "fine-tune: 0.5/4, 1 min 50 s, 11 min 30 s left",
        "fine-tune: 2/4, 1 h 06 min, 1 h 26 min left",
        "fine-tune: 2.5/4, 1 h 08 min, 49 min 52 s left",
    ]


def test_progress_without_steps_is_told_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress("thanos, seed 0") as report:
        report(40, "block 2 of 5")
    with Console().progress("wanda, seed 0") as report:
        report(100, "block 5 of 5")
    lines = [line.replace(", 0.0 s", "") for line in capsys.readouterr().out.splitlines()]
    assert lines == ["thanos, seed 0: 100 %", "wanda, seed 0: 100 %, block 5 of 5"]


def test_plain_progress_prints_its_end_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    with Console().progress("search", 4) as report:
        for step in (1, 4, 4):
            report(step)
    with Console().progress("decide", 4) as report:
        report(2)
        report(3)  # the rest is not needed
    assert capsys.readouterr().out.splitlines() == [
        "search: 4/4, 0.0 s",
        "decide: 3/4, 0.0 s",
    ]
    with pytest.raises(KeyboardInterrupt), Console().progress("train", 4) as report:
        report(3)
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""
