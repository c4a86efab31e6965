"""Which part the rows of tests play in a comparison."""

from typing import Any

SEARCHES = ("cem", "random_search", "netadapt", "amc", "sampler", "module:factory")
BEGINNINGS = ("prior", "policy:given")


def part(name: str) -> dict[str, Any]:
    """Return what a row of that name says of itself."""
    control = name in ("dense", *BEGINNINGS) or name.startswith("control:")
    role = "agent" if name.split("/")[0] == "agent" else "control" if control else "baseline"
    searches = role == "agent" or name in SEARCHES
    return {"role": role, "searches": searches, "beginning": name in BEGINNINGS}
