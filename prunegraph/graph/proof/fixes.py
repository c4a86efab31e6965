"""What is tried before channels are frozen, where a module's forward cannot follow a mask."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from prunegraph.graph.attribute_sizes import Attribute, Reading, tells_copies, tells_width
from prunegraph.graph.build import GraphBuilder
from prunegraph.graph.graph import SizeAttribute, StructureGraph
from prunegraph.graph.proof.subjects import Forward, Subject, awake, is_sound
from prunegraph.graph.proof.trial import Failure, Trial
from prunegraph.graph.trace.attribute_reads import is_custom, set_after_init
from prunegraph.graph.trace.recording import Recording

Fix = Callable[[], bool]
"""Changes what modules' attributes or inputs mean; returns whether that changed anything."""

MOST_DOUBTS = 4
"""Among more attributes, one that is no size, or one that is, is not looked for."""


class Fixes:
    """What is tried, before channels are frozen, when a module's forward cannot follow.

    In this order, for all modules of its class, see ``_steps``. Where a forward runs, but wrongly,
    one class after the other has no sizes among its attributes.

    Args:
        model: the network.
        recording: what its forward left behind.
        attention: "head" or "width", see ``analyse``.

    Attributes:
        reading: what is known of modules' attributes.
    """

    def __init__(self, model: nn.Module, recording: Recording, attention: str) -> None:
        self._model, self._recording, self._attention = model, recording, attention
        self._waiting: dict[type, tuple[list[Fix], list[Fix]]] = {}
        self._suspects: list[set[str]] | None = None
        self._suspect: set[str] = set()
        kinds = {type(module) for module in model.modules() if is_custom(type(module))}
        self.reading = Reading(written=frozenset().union(*map(set_after_init, kinds)))

    def builder(self) -> GraphBuilder:
        """Return what builds the structure as it is known now."""
        return GraphBuilder(self._model, self._recording, self.reading, self._attention)

    def resolve(self, run: Forward, *, lately: bool) -> StructureGraph:
        """Try the structure on the network, which is in eval mode, until its forward can follow.

        What no fix helps is frozen. An attribute that is a size by its value alone, perhaps by
        chance, is none where the forward can follow without it.

        Args:
            run: calls a network of the model's type on the example inputs.
            lately: weights of copies can be made when they are read.
        """
        subject = Subject(awake(self._model), run, lately=lately, bold=True)
        builder = self.builder()
        graph = builder.build()
        for some in _choices(self._doubts(graph)):
            if (found := self._without(some, subject)) is not None:
                graph = found
                break
        else:
            while (attempt := Trial(subject, graph)).failure is not None:
                # ends: each round freezes units, or uses up a fix
                if subject.model is not self._model and not is_sound(subject.model, run):
                    subject = Subject(self._model, run, lately=lately)
                elif not self.apply(attempt.failure, graph, least=attempt.least):
                    self._freeze(attempt, attempt.failure, builder)
                builder = self.builder()
                graph = builder.build()
        settled: set[Attribute] = set()
        while left := [doubt for doubt in self._doubts(graph) if doubt not in settled]:
            settled.add(left[0])
            graph = self._without(left[:1], subject) or graph
        return graph

    def _freeze(self, attempt: Trial, failure: Failure, builder: GraphBuilder) -> None:
        """Keep whole what the forward cannot lose, or two of its channels, if one is too few."""
        for group, cause in attempt.literal_sizes(failure):
            labels = builder.labels_of(group.units)
            if attempt.least and group.min_keep == 1 and group.units.size > 2:
                self._recording.pairs.append(labels)
            else:
                self._recording.store.freeze(labels, cause)

    def _without(self, doubts: Sequence[Attribute], subject: Subject) -> StructureGraph | None:
        """Return the structure where these are no sizes, if trials find that they are none."""
        self.reading.ignored |= {*doubts}
        graph = self.builder().build()
        if Trial(subject, graph).failure is None:
            return graph
        self.reading.ignored -= {*doubts}
        return None

    def _doubts(self, graph: StructureGraph) -> list[Attribute]:
        """Return the attributes that are sizes by their values alone, perhaps by chance.

        What none of their channels can leave does not change, and the number of copies of a head
        of keys follows the heads, whether the example shows it or not. What is read under another
        name alone, as einops' layers read ``_axes_lengths`` and are copied by ``axes_lengths``,
        follows that.
        """
        read = {self._named_pair(item) for item in graph.size_attributes}
        found: dict[Attribute, None] = {}
        for item in graph.size_attributes:
            kind = type(self._model.get_submodule(item.module))
            is_free = bool(graph.free[item.units[item.units >= 0]].any())
            by_name = tells_width(item.key) or tells_copies(item.key)
            follows = (item.module, f"_{item.name}", item.key) in read
            if is_free and is_custom(kind) and not (by_name or follows):
                found[kind, item.name, item.place] = None
        return list(found)

    def _named_pair(self, item: SizeAttribute) -> tuple[str, str, object]:
        """Return module and name of an attribute, and what a pair names whose number it is."""
        value = getattr(self._model.get_submodule(item.module), item.name)
        key = None
        if isinstance(value, tuple) and item.place[1:] == (1,):
            pair = value[int(item.place[0])]
            key = pair[0] if isinstance(pair, tuple) else None
        return item.module, item.name, key

    def apply(self, failure: Failure, graph: StructureGraph, *, least: bool) -> bool:
        """Change something for the module that failed; return False if nothing is left to try.

        Args:
            failure: what happened.
            graph: the structure as it was tried.
            least: with all but the least removed: with more, its attributes were right.
        """
        if failure.module is None:
            return not least and self._next_suspect(graph)
        kind = type(self._model.get_submodule(failure.module))
        alike = self._of(kind)
        if self._suspect & alike:  # it does read sizes there
            return self._next_suspect(graph)
        checks, others = self._waiting.setdefault(kind, self._steps(alike, graph))
        for waiting in (checks,) if least else (checks, others):
            while waiting:
                if waiting.pop(0)():
                    return True
        if least:
            return self._recording.tie_to_inputs(alike, heads=True)
        path = failure.module
        while path:  # the number may be that of a module around the one that fails
            path = path.rpartition(".")[0]
            if self._tie_named({path}, graph):
                return True
        return self._next_suspect(graph)

    def _tie_named(self, modules: set[str], graph: StructureGraph) -> bool:
        """Tie channels of several kinds whose number modules say by one attribute."""
        numbers = {
            (attribute.module, attribute.units.shape[attribute.axis])
            for attribute in graph.size_attributes
            if attribute.module in modules
        }
        return self._recording.tie_same_numbers(numbers)

    def _steps(self, alike: set[str], graph: StructureGraph) -> tuple[list[Fix], list[Fix]]:
        """Return what can be done for modules; each returns whether it changed something.

        The first of the two lists holds what may be needed where the least is left alone, too.
        """
        reading = self.reading
        sized = any(attribute.module in alike for attribute in graph.size_attributes)

        def check_inputs() -> bool:
            reading.checked |= alike & self._recording.inputs.keys()
            return bool(alike & reading.checked)

        def check_inputs_first() -> bool:
            reading.checked_first |= alike & reading.checked
            return bool(alike & reading.checked)

        def read_last() -> bool:
            reading.checked -= alike
            reading.checked_first -= alike
            ambiguous = sized and not self._recording.tells_apart(alike)
            reading.last_named |= alike if ambiguous else set()
            return ambiguous

        def read_none() -> bool:
            reading.last_named -= alike
            reading.literal |= alike if sized else set()
            return sized

        def tie(*, heads: bool) -> bool:
            reading.literal -= alike
            return self._recording.tie_to_inputs(alike, heads=heads)

        tie_heads, tie_others = partial(tie, heads=True), partial(tie, heads=False)
        others: list[Fix] = [read_last, read_none, tie_heads, read_none, tie_others]
        others.append(partial(self._tie_named, alike, graph))
        return [check_inputs, check_inputs_first], others

    def _of(self, kind: type) -> set[str]:
        """Return the paths of the modules of a class."""
        return {name for name, module in self._model.named_modules() if type(module) is kind}

    def _next_suspect(self, graph: StructureGraph) -> bool:
        """Leave the attributes of another class as they are, after the last as before."""
        if self._suspects is None:
            kinds = {type(self._model.get_submodule(a.module)) for a in graph.size_attributes}
            self._suspects = sorted(map(self._of, filter(is_custom, kinds)), key=min)
        had = bool(self._suspect)
        self.reading.literal -= self._suspect
        self._suspect = self._suspects.pop(0) - self.reading.literal if self._suspects else set()
        self.reading.literal |= self._suspect
        return had or bool(self._suspect)


def _choices(doubts: list[Attribute]) -> dict[tuple[Attribute, ...], None]:
    """Return which attributes may be no sizes: all, all but one, or one."""
    ones = doubts if len(doubts) <= MOST_DOUBTS else []
    rests = (tuple(each for each in doubts if each is not one) for one in ones)
    return dict.fromkeys(
        some for some in (tuple(doubts), *rests, *((one,) for one in ones)) if some
    )
