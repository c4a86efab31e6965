import dataclasses

import pytest

from prunegraph.runs.report.verdict import (
    MethodRow,
    Unit,
    best_baseline,
    column,
    each_cell_once,
    judge,
    mean_by_name,
    proxy_correlation,
    pruned_rows,
    verdict_line,
)
from support.parts import part

RECALIBRATED = "test_accuracy_recalibrated"


def row(name: str, seed: int, search: float, test: float, tuned: float | None = None) -> MethodRow:
    return MethodRow(
        name=name,
        **part(name),
        seed=seed,
        macs=1,
        params=1,
        search_accuracy=search,
        test_accuracy_recalibrated=test,
        test_accuracy_finetuned=tuned,
        networks_evaluated=1,
        digest=f"{name}{seed}",
    )


def rows(agent: list[float], baseline: list[float]) -> list[MethodRow]:
    return [row("agent", i, 0.9, value) for i, value in enumerate(agent)] + [
        row("cem", i, 0.8, value) for i, value in enumerate(baseline)
    ]


def test_a_clear_gain_over_three_seeds_is_learned() -> None:
    verdict, reason = judge(rows([0.90, 0.91, 0.90], [0.79, 0.81, 0.81]), RECALIBRATED)
    assert verdict == "LEARNED"
    assert "agent minus cem" in reason
    assert "+10.00 points" in reason


@pytest.mark.parametrize(
    ("seeds", "expected", "chance"), [(3, "NOT LEARNED", "0.125"), (5, "LEARNED", "0.031")]
)
def test_where_all_differences_are_the_same_their_signs_decide(
    seeds: int, expected: str, chance: str
) -> None:
    verdict, reason = judge(rows([0.9] * seeds, [0.8] * seeds), RECALIBRATED)
    assert verdict == expected
    assert f"two standard errors 0.00, all differences the same, p = {chance} by their" in reason


def test_a_gain_within_two_standard_errors_is_not() -> None:
    # differences 0.01, 0.03, -0.01: mean 0.01, standard error 0.02 / sqrt(3) = 0.0115
    verdict, reason = judge(rows([0.81, 0.83, 0.79], [0.80, 0.80, 0.80]), RECALIBRATED)
    assert verdict == "NOT LEARNED"
    assert "two standard errors 2.31" in reason


def test_two_seeds_give_no_verdict() -> None:
    verdict, reason = judge(rows([0.9, 0.9], [0.8, 0.8]), RECALIBRATED)
    assert verdict is None
    assert "2 seed(s)" in reason


def test_the_best_baseline_is_chosen_on_the_search_split_not_on_test() -> None:
    table = rows([0.90, 0.91, 0.90], [0.79, 0.81, 0.81])
    table += [row("l1/uniform", 0, 0.7, 0.99)]  # best on test, but nobody may choose by test
    assert judge(table, RECALIBRATED)[0] == "LEARNED"
    table += [row("taylor/global", 0, 0.85, 0.95)]
    verdict, reason = judge(table, RECALIBRATED)
    assert verdict == "NOT LEARNED"
    assert "taylor/global" in reason


def test_controls_are_not_baselines() -> None:
    table = rows([0.90, 0.91, 0.90], [0.79, 0.81, 0.81])
    table += [row("control:widths/l1", 0, 0.95, 0.99), row("dense", 0, 0.99, 0.99)]
    assert judge(table, RECALIBRATED)[0] == "LEARNED"


def test_what_the_policy_could_do_before_is_to_be_beaten() -> None:
    table = [row("agent", seed, 0.9, 0.9) for seed in range(5)] + [row("l1/uniform", 0, 0.5, 0.5)]
    assert judge(table, RECALIBRATED)[0] == "LEARNED"
    for name in ("prior", "policy:given"):
        verdict, reason = judge([*table, row(name, 0, 0.9, 0.9)], RECALIBRATED)
        assert verdict == "NOT LEARNED"
        assert f"agent minus {name}" in reason
    same = [dataclasses.replace(each, digest="one") for each in table]
    verdict, reason = judge(same, RECALIBRATED)
    assert verdict is None
    assert "one mask, measured once" in reason
    assert "over 5 seeds, which ended at one mask" in reason


def test_much_repair_is_not_learning() -> None:
    table = rows([0.90, 0.91, 0.90], [0.79, 0.81, 0.81])
    assert judge(table, RECALIBRATED, repaired=0.05)[0] == "LEARNED"
    verdict, reason = judge(table, RECALIBRATED, repaired=0.2)
    assert verdict == "NOT LEARNED"
    assert "20 %" in reason


def test_finetuned_rows_are_paired_by_the_seed_of_the_finetune() -> None:
    table = []
    for seed in range(5):
        table.append(
            dataclasses.replace(row("agent", seed, 0.9, 0.5, 0.9 + seed / 100), finetune_seed=seed)
        )
        table.append(
            dataclasses.replace(row("l1", 0, 0.8, 0.5, 0.8 + seed / 100), finetune_seed=seed)
        )
    verdict, reason = judge(table, "test_accuracy_finetuned")
    assert verdict == "LEARNED"
    assert "two standard errors 0.00" in reason


def test_no_rows_no_verdict() -> None:
    assert judge([], RECALIBRATED)[0] is None


def test_a_mask_of_several_finetunes_counts_once_before_them() -> None:
    tuned = [
        dataclasses.replace(row("a", 0, 0.5, 0.4, value), finetune_seed=seed)
        for seed, value in enumerate((0.7, 0.8, 0.9))
    ]
    table = [*tuned, row("a", 1, 0.9, 0.8)]
    assert column(table, "search_accuracy") == [0.5, 0.9]
    assert column(table, "test_accuracy_finetuned") == [0.7, 0.8, 0.9]
    assert mean_by_name(table, "test_accuracy_recalibrated") == pytest.approx({"a": 0.6})


def test_fine_tunes_of_one_mask_each_give_a_difference_and_no_verdict() -> None:
    gains = (0.02, 0.021, 0.019, 0.02, 0.02)
    table = [
        dataclasses.replace(row(name, 2, 0.9, 0.9, 0.8 + gain * (name == "agent")), finetune_seed=f)
        for f, gain in enumerate(gains)
        for name in ("agent", "cem")
    ]
    assert judge(table, "test_accuracy_finetuned")[0] is None
    others = [row("agent", seed, 0.5, 0.5) for seed in range(2)]
    verdict, reason = judge([*table, *others], "test_accuracy_finetuned")
    assert verdict is None
    assert "it tells of these masks, not of the methods: agent minus cem" in reason
    assert "+2.00 points of test_accuracy_finetuned over 5 fine-tunes of one mask each" in reason


def test_mean_by_name_skips_what_was_not_measured() -> None:
    table = [row("a", 0, 0.5, 0.5, 0.7), row("a", 1, 0.7, 0.5), row("b", 0, 0.1, 0.1)]
    assert mean_by_name(table, "search_accuracy") == pytest.approx({"a": 0.6, "b": 0.1})
    assert mean_by_name(table, "test_accuracy_finetuned") == pytest.approx({"a": 0.7})


def test_proxy_correlation_needs_eight_masks() -> None:
    table = [row(f"m{i}", 0, i / 10, 0.5, i / 20) for i in range(8)]
    assert proxy_correlation(table) == pytest.approx(1.0)
    assert proxy_correlation(table[:7]) is None
    reverse = [row(f"m{i}", 0, i / 10, 0.5, 1 - i / 20) for i in range(8)]
    assert proxy_correlation(reverse) == pytest.approx(-1.0)
    assert proxy_correlation([*table[:7], row("dense", 0, 0.9, 0.9, 0.9)]) is None


@pytest.mark.parametrize(
    ("verdict", "reason", "line"),
    [
        (
            "LEARNED",
            "above cem",
            "verdict: the agent beats the best baseline by more than chance (LEARNED: above cem)",
        ),
        (None, "no verdict: 1 seed(s)", "no verdict: 1 seed(s)"),
    ],
)
def test_a_missing_verdict_is_not_called_none(verdict: str | None, reason: str, line: str) -> None:
    assert verdict_line({"verdict": verdict, "verdict_reason": reason}) == line


def test_of_rows_with_one_mask_the_agents_are_the_pruned_networks() -> None:
    names = ("cem", "agent", "control:widths/l1")
    found = [dataclasses.replace(row(name, 0, 0.5, 0.5), digest="a") for name in names]
    assert [item.name for item in pruned_rows(found, "a")] == ["agent"]
    assert [item.name for item in pruned_rows(found[::2], "a")] == ["cem"]
    assert pruned_rows(found, "b") == []


def test_a_fine_tune_that_two_methods_share_counts_once() -> None:
    found = [
        dataclasses.replace(row(name, 0, 0.5, 0.5, tuned), cell=cell)
        for name, tuned, cell in (("cem", 0.9, "x"), ("amc", 0.9, "x"), ("cem", 0.7, "y"))
    ]
    untuned = row("cem", 1, 0.5, 0.5)
    assert each_cell_once([*found, untuned, untuned]) == [found[0], found[2], untuned, untuned]


def test_an_error_is_better_where_it_is_lower_and_files_hold_it_as_it_is() -> None:
    unit = Unit(name="perplexity", higher_is_better=False)
    rows = [row("agent", seed, -20.0, -21.0) for seed in range(3)]
    rows += [row("cem", seed, -30.0, -31.0) for seed in range(3)]
    assert best_baseline(rows) == "cem"
    verdict, reason = judge(rows, RECALIBRATED, unit=unit)
    assert verdict == "NOT LEARNED"  # three differences that are the same may be chance
    assert "+10.00 perplexity better of test_score_recalibrated" in reason
    written = unit.written(rows[0].to_json())
    assert written["test_score_recalibrated"] == 21.0
    assert "test_accuracy_recalibrated" not in written
    assert unit.read(written) == rows[0].to_json()
    assert unit.text(-21.0) == "21.00"
    assert Unit().written(rows[0].to_json()) == rows[0].to_json()
