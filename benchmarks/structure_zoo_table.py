"""The verdict of ``structure_zoo.py`` on its rows, and their table."""

from typing import Any

HALF = 0.5


def shortcomings(row: dict[str, Any]) -> list[str]:
    """Return why a network does not pass."""
    if "error" in row:
        return [row["error"]]
    found = list(row["failures"])
    found += [] if row["compared"] or found else ["its outputs hardly depend on its inputs"]
    if row["least_macs"] > HALF:
        reasons = sorted(row["frozen"], key=row["frozen"].get, reverse=True)
        found.append(f"{row['least_macs']:.0%} of the MACs must stay: {'; '.join(reasons[:2])}")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| library | networks | analysed | masked = pruned | half of the MACs can go | pass |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for library in dict.fromkeys(row["library"] for row in rows):
        own = [row for row in rows if row["library"] == library]
        done = [row for row in own if "error" not in row]
        equal = [row for row in done if row["compared"] and not row["failures"]]
        half = [row for row in done if row["least_macs"] <= HALF]
        passed = sum(not shortcomings(row) for row in own)
        counts = (len(own), len(done), len(equal), len(half), passed)
        lines.append(f"| {library} | {' | '.join(map(str, counts))} |")
    lines += ["", "Those that do not pass:", ""]
    for row in rows:
        found = shortcomings(row)
        lines += [f"- {row['library']}/{row['name']}: {'; '.join(found)}"] if found else []
    return "\n".join(lines)
