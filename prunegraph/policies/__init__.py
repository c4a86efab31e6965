"""Policies that come with the package, and their names."""

from pathlib import Path

from prunegraph.core.files import POLICY_FILE


def is_shipped(policy: Path) -> bool:
    """Tell whether a name means a policy of the package: there is one, and none at that path."""
    return str(policy) in shipped_policies() and not (policy / POLICY_FILE).is_file()


def shipped_policies() -> dict[str, Path]:
    """Return the policies that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.safetensors"))}
