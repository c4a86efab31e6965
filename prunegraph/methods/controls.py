@dataclass(frozen=True)
class WidthsControl:
    """Keeps given numbers of units a group, chosen by a criterion.

    Answers whether a mask is good for *which* channels it keeps or for *how many*: the cost is that
    of the mask whose widths are given.

    Args:
        criterion: one of ``CRITERION_NAMES``.
        widths: kept units of each group that may be pruned (``StructureGraph.group_widths``).
    """

    criterion: str
    widths: Mapping[str, int]

    def __post_init__(self) -> None:
        _check_criterion(self.criterion)

    @property
    def name(self) -> str:
        """``"criterion/control_widths"``."""
        return f"{self.criterion}/control_widths"

    def prune(self, problem: Problem) -> Result:
        """Choose the mask; runs no network.

        Raises:
            MaskError: the widths name other groups, or a width is out of range.
        """
        graph = problem.graph
        values = importance(self.criterion, problem.statistics, graph.num_units, problem.seed)
        if set(self.widths) != set(graph.group_widths(graph.dense_mask())):
            odd = sorted(set(self.widths) ^ set(graph.group_widths(graph.dense_mask())))
            msg = f"widths do not fit this structure: {odd[0]!r} is missing or unknown"
            raise MaskError(msg)
        keep = graph.frozen.copy()
        for group in graph.groups:
            width = self.widths.get(group.name, 0)
            if width > len(group.units):
                msg = f"{group.name} has {len(group.units)} units, not {width}"
                raise MaskError(msg)
            order = np.argsort(-values[group.units], kind="stable")
            keep[group.units[order[:width]]] = True
        return Result(mask=graph.mask(keep))


def _check_criterion(criterion: str) -> None:
    if criterion not in CRITERION_NAMES:
        msg = f"unknown criterion {criterion!r}; there are {', '.join(CRITERION_NAMES)}"
        raise ConfigError(msg)
