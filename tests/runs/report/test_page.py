"""The page of a run: whole, self-contained, escaped, and narrow enough for a phone."""

import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_bytes, write_json, write_text
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import CommonConfig, TrainConfig
from prunegraph.runs.report.page import (
    next_steps,
    page,
    read_findings,
    result_rows,
    weights_on_disk,
    write_page,
)
from prunegraph.runs.report.plots import Findings, draw
from prunegraph.runs.report.tables import method_cells, method_columns
from prunegraph.runs.store import write_masks

Make = Callable[..., Findings]
Browser = Callable[..., tuple[int, ...]]
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "--><script>alert('1')</script>&amp;\"$x_1$</svg>"
CONFIG = TrainConfig(keep_macs=0.5, weights=(Path("a b.safetensors"),))


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


RUN = RunFolder(path=Path("runs") / "no such run")


def made(findings: Findings, config: CommonConfig = CONFIG, folder: RunFolder = RUN) -> str:
    return page(config, folder, findings, draw(findings))


def test_the_page_is_whole_and_needs_nothing_else(make_findings: Make) -> None:
    text = made(make_findings())
    parsed = Page(text)
    assert text.startswith("<!doctype html>")
    assert parsed.named("html") == [{"lang": "en"}]
    viewports = [meta for meta in parsed.named("meta") if meta.get("name") == "viewport"]
    assert len(viewports) == 1
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.elements}
    picture = r"data:image/png;base64,[\w+/=\s]+"
    assert not re.search(r"https?:|//|@import", re.sub(picture, "", text))
    addresses = [
        value
        for _, attributes in parsed.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert addresses
    assert all(re.fullmatch(rf"#.*|{picture}", str(address)) for address in addresses)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_the_page_says_which_mask_was_pruned_and_how_it_was_trained(make_findings: Make) -> None:
    content = make_findings().content
    rows = [{**row, "seed": seed} for row in content["methods"] for seed in (0, 1)]
    text = made(make_findings(methods=rows, pruned={**content["pruned"], "seed": 1}))
    assert "the mask of seed 1: the best of them on the search split" in text
    alone = [row for row in content["methods"] if row["seed"] == 0]
    assert "the best of them" not in made(make_findings(methods=alone))
    recipe = {"epochs": 10, "peak_lr": 0.02}
    assert "epochs 10, peak_lr 0.02" in made(make_findings(recipe=recipe))


def test_the_page_of_an_applied_policy_speaks_of_no_search(make_findings: Make) -> None:
    decision = {"start": "mean", "share": 0.5, "divergence": {}}
    text = made(make_findings(decision=decision))
    assert "What the decision cost" in text
    assert "a policy was applied, which gives one mask" in text
    assert "one search after the other" not in text


def test_every_figure_and_scrolling_box_has_a_name(make_findings: Make) -> None:
    parsed = Page(made(make_findings()))
    figures, svgs = parsed.named("figure"), parsed.named("svg")
    assert len(figures) == len(svgs) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    boxes = [box for box in parsed.named("div") if "box" in str(box.get("class")).split()]
    assert len(boxes) >= 4
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_what_the_search_cost_and_how_it_ended_is_told(make_findings: Make) -> None:
    search = {"seconds": 60.0, "networks_evaluated": 32, "evaluation_seconds": 45.0}
    early = ["LEARNED", "4 points above cem"]
    found = make_findings(search=search, stage_one_verdict=early, proxy_rank_correlation=0.5)
    parsed = Page(made(found))
    facts = dict(zip(parsed.cells, parsed.cells[1:], strict=False))
    assert facts["in evaluations, all workers together"] == "45 s (75 %)"
    assert facts["networks a minute"] == "32"
    assert facts["rank correlation of search and fine-tuned accuracy"] == "0.50"
    assert "Before the fine-tune: LEARNED: 4 points above cem" in parsed.text
    same = make_findings(stage_one_verdict=[None, found.content["verdict_reason"]])
    assert "Before the fine-tune" not in Page(made(same)).text


def test_the_table_has_the_numbers_of_the_terminal(make_findings: Make) -> None:
    findings = make_findings()
    cells = Page(made(findings)).cells
    for row in method_cells(findings.content):
        first = cells.index(row[0], cells.index("nets"))
        assert tuple(cells[first : first + len(row)]) == row
    assert "agent (x2)" in cells
    assert "77.50 ± 3.54" in cells


def test_what_was_got_is_told_before_and_after(make_findings: Make) -> None:
    findings = make_findings(peak_memory={"dense": 4096, "pruned": 1024})
    rows = {row[0]: row[1:] for row in result_rows(findings.content)}
    assert rows["activations alive at once"] == ("4.096 kB", "1.024 kB", "25.0 %")
    assert rows["time of one image"] == ("1 ms", "0.5 ms", "50.0 %")
    assert rows["the same, fine-tuned"] == ("91.00 %", "88.00 %", "-3.00 pts")
    text = made(findings)
    assert "Budget: at most 0.5 of the multiply-adds." in text
    assert "no verdict: 2 seed(s)" in text


def test_a_page_without_an_agent_has_no_verdict(make_findings: Make) -> None:
    rows = [{**row, "role": "baseline"} for row in make_findings().content["methods"]]
    assert "no verdict" not in made(make_findings(methods=rows))


def test_scores_without_fine_tunes_are_not_said_to_be_recalibrated(make_findings: Make) -> None:
    content = make_findings().content
    assert "test acc. recal." in method_columns(content)
    rows = [{**row, "test_accuracy_finetuned": None} for row in content["methods"]]
    columns = method_columns(make_findings(methods=rows).content)
    assert columns[-4:] == ("search acc.", "test acc.", "nets", "minutes")


def test_user_data_is_escaped_everywhere(make_findings: Make) -> None:
    config = TrainConfig(keep_macs=0.5, weights=(Path(HOSTILE),))
    entries = {
        "arch": HOSTILE,
        "dataset": HOSTILE,
        "verdict_reason": HOSTILE,
        "machine": {"processor": HOSTILE},
        "latency_ms": {"dense": 1.0, "pruned": 1.0, "on": HOSTILE},
    }
    text = made(make_findings(HOSTILE, **entries), config)
    parsed = Page(text)
    assert parsed.named("script") == []
    assert len(parsed.named("svg")) == text.count("</svg>") == 4
    assert parsed.text.count(HOSTILE) >= 8
    assert parsed.named("title") == [{}]
    assert "--><" not in text


def test_a_section_without_data_is_left_out(make_findings: Make) -> None:
    whole = Page(made(make_findings())).text
    shown = Page(made(make_findings(search=None, history={}))).text
    assert "What the search cost" in whole
    assert "What the search cost" not in shown
    assert "How to repeat it" in shown


def test_the_command_is_shown_as_a_shell_takes_it(make_findings: Make) -> None:
    text = Page(made(make_findings())).text
    assert "prunegraph train \\\n  --weights 'a b.safetensors' \\\n  --keep-macs 0.5" in text


def test_the_weights_on_disk_are_told_where_they_are(make_findings: Make, tmp_path: Path) -> None:
    findings = make_findings()
    for folder, cell in (("train", "pruned"), ("compare", "cells/ab")):
        run = RunFolder(path=tmp_path / folder)
        rows = [dict(row) for row in findings.content["methods"]]
        rows[0]["cell"] = cell
        content = findings.content | {"methods": rows}
        write_bytes(run.file("dense.safetensors"), bytes(4000))
        assert weights_on_disk(run, content) is None
        write_bytes(run.file(cell) / "pruned.safetensors", bytes(1000))
        assert weights_on_disk(run, content) == (4000, 1000)
    cells = Page(made(make_findings(methods=rows), folder=run)).cells
    first = cells.index("weights on disk")
    assert cells[first + 1 : first + 4] == ["4 kB", "1 kB", "25.0 %"]
    assert "weights on disk" not in [row[0] for row in result_rows(findings.content)]


def test_a_cell_outside_the_run_is_not_read(make_findings: Make, tmp_path: Path) -> None:
    rows = [dict(row) for row in make_findings().content["methods"]]
    rows[0]["cell"] = "../elsewhere"
    with pytest.raises(ArtefactError, match="outside the folder"):
        made(make_findings(methods=rows), folder=RunFolder(path=tmp_path / "run"))


def test_the_next_commands_name_the_network_and_the_run(
    make_findings: Make, tmp_path: Path
) -> None:
    run = RunFolder(path=tmp_path / "somewhere")
    write_text(run.file("config.yaml"), "")
    commands = [command for _, command in next_steps(run, make_findings().content)]
    assert commands == ["prunegraph export RUN", "prunegraph verify RUN"]
    rows = [dict(row) for row in make_findings().content["methods"]]
    rows[0]["cell"] = "cells/ab"
    compared = make_findings(methods=rows, arch="package.module:net", dataset="mine:images")
    commands = [command for _, command in next_steps(run, compared.content)]
    assert commands == [
        "prunegraph export RUN/cells/ab --arch package.module:net",
        "prunegraph verify RUN --arch package.module:net --dataset mine:images",
    ]
    text = Page(made(compared, folder=run)).text
    assert all(command in text for command in commands)
    assert "somewhere" not in text


def test_a_further_network_is_verified_with_its_run(make_findings: Make, tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", "")
    member = RunFolder(path=tmp_path / "1-toy")
    commands = [command for _, command in next_steps(member, make_findings().content)]
    assert commands == ["prunegraph export RUN/1-toy", "prunegraph verify RUN"]


def test_a_page_is_made_from_the_files_of_a_run(make_findings: Make, tmp_path: Path) -> None:
    findings, folder = make_findings(), RunFolder(path=tmp_path)
    write_json(folder.file(RunFolder.REPORT), findings.content)
    write_json(folder.file("history.json"), findings.history)
    write_masks(folder.file("masks.json"), list(findings.masks.values()))
    again = read_findings(folder, findings.graph)
    write_page(CONFIG, folder, again, draw(again))
    assert folder.file(RunFolder.PAGE).read_text() == made(findings, folder=folder)
    other = make_findings(graph="0123456789abcdef")
    write_json(folder.file(RunFolder.REPORT), other.content)
    with pytest.raises(ArtefactError, match="made of another toy"):
        read_findings(folder, findings.graph)


KEYBOARD = """<script>
document.querySelectorAll("summary").forEach(summary => summary.click())
const stops = [...document.querySelectorAll("a[href], summary, [tabindex='0']")]
const missed = stops.filter(stop => (stop.focus(), document.activeElement !== stop))
const scrolled = [...document.querySelectorAll("main *")].filter(one => one.tabIndex < 0
  && one.scrollWidth > one.clientWidth && /auto|scroll/.test(getComputedStyle(one).overflowX))
const closed = [...document.querySelectorAll("details:not([open])")]
document.title = [stops, missed, scrolled, closed].map(found => found.length).join(" ")
</script></body>"""
"""Counts what takes the focus, what does not, what scrolls without it, what stays shut."""


STICKY = """<script>
const box = [...document.querySelectorAll(".box")].find(box => box.scrollWidth > 2 * innerWidth)
const cells = box.querySelectorAll("tbody tr:last-child > *")
const places = () => [...cells].map(cell => cell.getBoundingClientRect().left)
const before = places()
box.scrollLeft = 100
document.title = places().map((place, i) => place - before[i]).join(" ")
</script></body>"""


def test_a_browser_shows_the_page_without_scrolling_sideways(
    make_findings: Make, browser: Browser
) -> None:
    text = made(make_findings("a_module." * 12 + "conv", arch="package.module:" + "x" * 90))
    for width in (360, 1280):
        assert browser(text, width) == (width, width, 4)
    wide = text.replace("</main>", '</main><p style="width: 900px; max-width: none">wide</p>')
    assert browser(wide, 360) == (900, 360, 4)


def test_the_names_of_methods_stay_when_their_table_scrolls(
    make_findings: Make, browser: Browser
) -> None:
    text = made(make_findings("a_module." * 12 + "conv"))
    first, *others = browser(text, 360, STICKY)
    assert first == 0
    assert others == [-100] * len(others) != []


def test_all_of_the_page_is_reached_by_keyboard(make_findings: Make, browser: Browser) -> None:
    text = made(make_findings("a_module." * 12 + "conv"))
    stops, missed, scrolled, closed = browser(text, 360, KEYBOARD)
    assert stops > 5
    assert (missed, scrolled, closed) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report, history: report["pruned"].update(mask_digest="ff"), "lacks the mask ff"),
        (lambda report, history: report["latency_ms"].update(batch=64), "latency_ms.batch"),
        (lambda report, history: report["latency_ms"].update(batch=[], on="x"), "latency_ms.batch"),
        (lambda report, history: report.update(latency_ms={"dense": 1.0}), "latency_ms.pruned"),
        (lambda report, history: report.update(latency_ms="x"), "latency_ms"),
        (lambda report, history: report.pop("search"), "search is missing"),
        (lambda report, history: report.update(search={}), "search.seconds is missing"),
        (lambda report, history: report.update(recipe=3), "recipe"),
        (lambda report, history: report.update(budget={"bogus": 1.0}), "budget.bogus"),
        (lambda report, history: report["data"]["train"].pop("samples"), "samples is missing"),
        (lambda report, history: history.pop("accuracy"), "accuracy is missing"),
        (lambda report, history: history["accuracy"].pop(), "equally many points"),
        (lambda report, history: history.update(reward=[1e308, -1e308, 0.0]), "lies beyond"),
        (lambda report, history: report["search"].update(seconds=0.0), "search.seconds"),
        (lambda report, history: report.update(stage_one_verdict=["x"]), "stage_one_verdict"),
        (lambda report, history: report["search"].update(seeds=5), "search.seeds"),
        (lambda report, history: report.update(proxy_rank_correlation=3.0), "proxy_rank_corr"),
        (lambda report, history: report.update(methods=[]), "methods is damaged"),
        (
            lambda report, history: [row.update(role="control") for row in report["methods"]],
            "methods is damaged",
        ),
    ],
)
def test_a_damaged_report_gives_one_line(
    change: Callable[[dict[str, Any], dict[str, Any]], object],
    message: str,
    make_findings: Make,
    tmp_path: Path,
) -> None:
    findings, folder = make_findings(), RunFolder(path=tmp_path)
    report, history = copy.deepcopy((dict(findings.content), dict(findings.history)))
    change(report, next(iter(history.values())))
    write_json(folder.file(RunFolder.REPORT), report)
    write_json(folder.file("history.json"), history)
    write_masks(folder.file("masks.json"), list(findings.masks.values()))
    with pytest.raises(ArtefactError, match=message):
        read_findings(folder, findings.graph)
