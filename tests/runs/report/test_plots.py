import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prunegraph.runs.report.groups import FREE, FROZEN, REMOVED
from prunegraph.runs.report.plots import (
    INK,
    MARKS,
    MOST_METHODS,
    MUTED,
    PAPER,
    SEED_COLOURS,
    Findings,
    draw,
    save_plots,
    to_svg,
)

PHONE = 360 - 2 * 16
"""CSS pixels beside the margins of a phone's page."""

Make = Callable[..., Findings]


def test_plots_are_png_files(make_findings: Make, tmp_path: Path) -> None:
    save_plots(draw(make_findings()), tmp_path / "plots")
    files = sorted((tmp_path / "plots").iterdir())
    names = ["groups", "methods", "search", "widths"]
    assert [path.name for path in files] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_what_has_no_data_is_not_drawn(make_findings: Make) -> None:
    flat = {"networks": [16], "accuracy": [0.5]}
    assert "search" not in draw(make_findings(history={"one update": flat}))
    assert "search" not in draw(make_findings(history={}))


def test_curves_that_never_move_are_left_out(make_findings: Make) -> None:
    figure = draw(make_findings())["search"].figure
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "accuracy,\nmean",
        "reward,\nmean",
    ]


def test_the_widths_of_the_best_baselines_stand_beside_the_agents(make_findings: Make) -> None:
    findings = make_findings()
    assert list(findings.rivals) == ["cem", "l1/uniform"]
    legend = draw(findings)["widths"].figure.legends[0]
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {"kept", "removed", "cem", "l1/uniform"}
    assert draw(findings)["widths"].figure.axes[0].get_xlabel() == "units kept, %"  # heads, too


def test_svgs_of_one_page_share_no_id_and_follow_its_colours(make_findings: Make) -> None:
    plots = draw(make_findings())
    svgs = {name: to_svg(plot, name) for name, plot in plots.items()}
    ids = [found for svg in svgs.values() for found in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(set(ids)) == len(ids) > 100
    for name, svg in svgs.items():
        used = re.findall(r'(?:"#|url\(#)([^")]*)', svg)
        assert set(used) <= set(ids)
        assert all(one.startswith(f"{name}-") for one in used)
        assert "http" not in svg
        assert not any(colour in svg for colour in (INK, PAPER, MUTED))
        assert "var(--ink)" in svg


def test_the_text_of_a_figure_holds_its_numbers(make_findings: Make) -> None:
    plots = draw(make_findings())
    assert "dense 90.0 %" in plots["methods"].text
    assert "50.0 % to 70.0 %" in plots["search"].text
    assert 'aria-label="Line plots of agent, seed 0. ' in to_svg(plots["search"], "search")


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_from_a_light_and_a_dark_page() -> None:
    assert contrast("#f2b27a", "#ffffff") == pytest.approx(1.84, abs=0.01)
    colours = {FREE, FROZEN, REMOVED, *SEED_COLOURS, *(colour for colour, _ in MARKS.values())}
    for colour in colours - {INK, MUTED}:  # which are others on a dark page
        assert contrast(colour, "#ffffff") > 3 < contrast(colour, "#15181c"), colour


def test_letters_can_be_read_on_a_phone(make_findings: Make) -> None:
    for name, plot in draw(make_findings()).items():
        svg = to_svg(plot, name)
        width = float(re.findall(r'width="([0-9.]+)pt"', svg)[0])
        shown = 4 / 3 * width if name == "groups" else min(4 / 3 * width, PHONE)
        letters = [float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )*([0-9.]+)px", svg)]
        assert letters
        assert min(letters) * shown / width >= 9.5, name


def test_what_was_removed_is_seen_without_colours(make_findings: Make) -> None:
    plots = draw(make_findings())
    for name, number in (("widths", 0), ("groups", 1)):
        bars = plots[name].figure.axes[number].patches
        hatches = [bar.get_hatch() for bar in bars]
        half = len(bars) // 2
        assert set(hatches[:half]) == {None}, name
        assert None not in hatches[half:], name
    legend = plots["groups"].figure.axes[0].get_legend()
    assert legend is not None
    assert [patch.get_hatch() is None for patch in legend.get_patches()] == [True, False, True]


def test_kinds_of_methods_differ_by_shape_and_are_named(make_findings: Make) -> None:
    assert len({marker for _, marker in MARKS.values()}) == len(MARKS)
    plots = draw(make_findings())
    for name in ("methods",):
        figure = plots[name].figure
        shown = {line.get_marker() for line in figure.axes[0].lines} - {"None"}
        assert shown == {MARKS[kind][1] for kind in ("agent", "search", "no search", "dense")}
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names == ["agent", "search", "no search", "dense"]
        filling = figure.legends[0].get_title().get_text()
        assert filling == "hollow: before the fine-tune, filled: after it"


def test_labels_of_a_small_range_of_errors_are_plain(make_findings: Make) -> None:
    errors = {"thanos": {"first": 0.0002, "second": 0.0017, "third": 0.0005}}
    plot = draw(make_findings(layer_errors=errors))["errors"]
    svg = to_svg(plot, "errors")
    assert ">0.02<" in svg
    assert "$" not in svg


def test_methods_are_dots_before_and_after_the_finetune(make_findings: Make) -> None:
    axes = draw(make_findings())["methods"].figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["dense", "agent", "cem", "l1/uniform"]
    dots = {
        (names[int(line.get_ydata()[0])], line.get_markerfacecolor() != "none"): x
        for line in axes.lines
        if line.get_marker() != "None"
        for x in line.get_xdata()
    }
    assert dots == pytest.approx(
        {
            ("dense", False): 90,
            ("dense", True): 91,
            ("agent", False): 76.5,
            ("agent", True): 88,
            ("cem", False): 69,
            ("l1/uniform", False): 64,
        }
    )
    assert len(axes.containers) == 4
    spreads = [container.has_xerr for container in axes.containers]
    assert spreads == [True, False, False, False]  # two seeds, the fine-tune of one, single rows


def test_the_best_are_spoken_of_only_where_others_are_left_out(make_findings: Make) -> None:
    row = make_findings().content["methods"][2]
    for count, words in ((MOST_METHODS, "of all methods"), (MOST_METHODS + 1, "20 best of 21")):
        methods = [row | {"name": f"method{number}"} for number in range(count)]
        assert words in draw(make_findings(methods=methods))["methods"].caption
