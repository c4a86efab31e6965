import re
from collections.abc import Callable
from pathlib import Path

from prunegraph.experiment.plots import INK, MUTED, PAPER, Findings, draw, save_plots, to_svg

Make = Callable[..., Findings]


def test_plots_are_png_files(make_findings: Make, tmp_path: Path) -> None:
    save_plots(draw(make_findings()), tmp_path / "plots")
    files = sorted((tmp_path / "plots").iterdir())
    names = ["groups.png", "methods.png", "pareto.png", "search.png", "widths.png"]
    assert [path.name for path in files] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_what_has_no_data_is_not_drawn(make_findings: Make) -> None:
    flat = {"networks": [16], "accuracy": [0.5]}
    assert set(draw(make_findings(methods=[], history={"one update": flat}))) == {
        "widths",
        "groups",
    }
    assert set(draw(make_findings(pruned=None, history={}))) == {"pareto", "methods", "groups"}


def test_curves_that_never_move_are_left_out(make_findings: Make) -> None:
    figure = draw(make_findings())["search"].figure
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "accuracy,\nmean",
        "accuracy,\npolicy's own",
        "reward,\nmean",
    ]


def test_the_widths_of_the_best_baselines_stand_beside_the_agents(make_findings: Make) -> None:
    findings = make_findings()
    assert list(findings.rivals) == ["cem", "l1/uniform"]
    legend = draw(findings)["widths"].figure.legends[0]
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {"kept", "removed", "cem", "l1/uniform"}


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
    assert "agent/best: " in plots["pareto"].text
    assert "dense 90.0 %" in plots["methods"].text
    assert "50.0 % to 70.0 %" in plots["search"].text
    assert 'aria-label="Line plots of agent/best, seed 0. ' in to_svg(plots["search"], "search")
