"""What is tried before channels are frozen, where a module's forward cannot follow a mask."""

from collections.abc import Callable, Sequence
from functools import cache

from torch import nn

from prunegraph.graph.attribute_sizes import tells_copies, tells_width
from prunegraph.graph.build import GraphBuilder
from prunegraph.graph.graph import Place, SizeAttribute, StructureGraph
from prunegraph.graph.proof.subjects import Bold, Forward, awake, is_sound
from prunegraph.graph.proof.trial import Failure, Trial, can_train
from prunegraph.graph.trace.attribute_reads import is_custom, set_after_init
from prunegraph.graph.trace.recording import Recording

Fix = Callable[[], bool]
"""Changes what modules' attributes or inputs mean; returns whether that changed anything."""

Attribute = tuple[type, str, Place]
"""A class of modules, the name of an attribute, the place of an integer in it."""


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
        literal: paths of modules whose attributes surgery leaves as they are.
        last_named: paths of modules in which an attribute is the last size of those that it fits.
        checked: paths of modules that compare the width of their input with an attribute.
        checked_first: those of them in which that is what an attribute of this size is.
        ignored: classes of modules, and attributes of these that are no sizes.
    """

    def __init__(self, model: nn.Module, recording: Recording, attention: str) -> None:
        self._model, self._recording, self._attention = model, recording, attention
        self._waiting: dict[type, tuple[list[Fix], list[Fix]]] = {}
        self._suspects: list[set[str]] | None = None
        self._suspect: set[str] = set()
        self.literal: set[str] = set()
        self.last_named: set[str] = set()
        self.checked: set[str] = set()
        self.checked_first: set[str] = set()
        self.ignored: set[Attribute] = set()
        kinds = {type(module) for module in model.modules() if is_custom(type(module))}
        self._written = frozenset[str]().union(*(set_after_init(kind) for kind in kinds))

    def builder(self) -> GraphBuilder:
        """Return what builds the structure as it is known now."""
        return GraphBuilder(
            self._model,
            self._recording,
            literal=self.literal,
            last_named=self.last_named,
            checked=self.checked,
            checked_first=self.checked_first,
            ignored=self.ignored,
            written=self._written,
            attention=self._attention,
        )

    def resolve(self, run: Forward, *, lately: bool) -> StructureGraph:
        """Try the structure on the network, which is in eval mode, until its forward can follow.

        What no fix helps is frozen. An attribute that is a size by its value alone, perhaps by
        chance, is none where the forward can follow without it.

        Args:
            run: calls a network of the model's type on the example inputs.
            lately: weights of copies can be made when they are read.
        """
        subject = awake(self._model)
        bold: Bold | None = Bold(subject, run, lately=lately)
        training = cache(lambda: can_train(subject, run))

        def tried(graph: StructureGraph) -> Trial:
            return Trial(subject, bold, graph, run, training=training, lately=lately)

        builder = self.builder()
        graph = builder.build()
        for some in _choices(self._doubts(graph)):
            if (found := self._without(some, tried)) is not None:
                graph = found
                break
        else:
            while (attempt := tried(graph)).failure is not None:
                # ends: each round freezes units, or uses up a fix
                if subject is not self._model and not is_sound(subject, run):
                    subject, bold = self._model, None
                elif not self.apply(attempt.failure, graph, least=attempt.least):
                    self._freeze(attempt, attempt.failure, builder)
                builder = self.builder()
                graph = builder.build()
        settled: set[Attribute] = set()
        while left := [doubt for doubt in self._doubts(graph) if doubt not in settled]:
            settled.add(left[0])
            graph = self._without(left[:1], tried) or graph
        return graph

    def _freeze(self, attempt: Trial, failure: Failure, builder: GraphBuilder) -> None:
        """Keep whole what the forward cannot lose, or two of its channels, if one is too few."""
        for group, cause in attempt.literal_sizes(failure):
            labels = builder.labels_of(group.units)
            if attempt.least and group.min_keep == 1 and group.units.size > 2:
                self._recording.pairs.append(labels)
            else:
                self._recording.store.freeze(labels, cause)

    def _without(
        self, doubts: Sequence[Attribute], tried: Callable[[StructureGraph], Trial]
    ) -> StructureGraph | None:
        """Return the structure where these are no sizes, if trials find that they are none."""
        self.ignored |= {*doubts}
        graph = self.builder().build()
        if tried(graph).failure is None:
            return graph
        self.ignored -= {*doubts}
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
        alike = {name for name, module in self._model.named_modules() if type(module) is kind}
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
        tie = self._recording.tie_to_inputs
        sized = any(attribute.module in alike for attribute in graph.size_attributes)

        def check_inputs() -> bool:
            self.checked |= alike & self._recording.inputs.keys()
            return bool(alike & self.checked)

        def check_inputs_first() -> bool:
            self.checked_first |= alike & self.checked
            return bool(alike & self.checked)

        def read_last() -> bool:
            self.checked -= alike
            self.checked_first -= alike
            ambiguous = sized and not self._recording.tells_apart(alike)
            self.last_named |= alike if ambiguous else set()
            return ambiguous

        def read_none() -> bool:
            self.last_named -= alike
            self.literal |= alike if sized else set()
            return sized

        def tie_heads() -> bool:
            self.literal -= alike
            return tie(alike, heads=True)

        def read_none_of_tied() -> bool:
            self.literal |= alike
            return sized

        def tie_others() -> bool:
            self.literal -= alike
            return tie(alike, heads=False)

        others = [read_last, read_none, tie_heads, read_none_of_tied, tie_others]
        others.append(lambda: self._tie_named(alike, graph))
        return [check_inputs, check_inputs_first], others

    def _next_suspect(self, graph: StructureGraph) -> bool:
        """Leave the attributes of another class as they are, after the last as before."""
        if self._suspects is None:
            kinds = {type(self._model.get_submodule(a.module)) for a in graph.size_attributes}
            modules = list(self._model.named_modules())
            named = [
                {n for n, m in modules if type(m) is kind} for kind in kinds if is_custom(kind)
            ]
            self._suspects = sorted(named, key=min)
        had = bool(self._suspect)
        self.literal -= self._suspect
        self._suspect = self._suspects.pop(0) - self.literal if self._suspects else set()
        self.literal |= self._suspect
        return had or bool(self._suspect)


def _choices(doubts: list[Attribute]) -> dict[tuple[Attribute, ...], None]:
    """Return which attributes may be no sizes: all, all but one, or one."""
    ones = doubts if len(doubts) <= MOST_DOUBTS else []
    rests = (tuple(each for each in doubts if each is not one) for one in ones)
    return dict.fromkeys(
        some for some in (tuple(doubts), *rests, *((one,) for one in ones)) if some
    )
