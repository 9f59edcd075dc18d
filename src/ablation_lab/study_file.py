"""A study's text as plain values, and where in it each of them stands.

A study may come from anybody, and YAML can say in a few lines what unfolds to gigabytes, contains itself, or makes
objects: none of that gets out of here.
"""

import io
from collections.abc import Iterable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from ablation_lab.errors import LabError, shown

# The largest ready-made study has 4 KB, 150 values and 6 levels.
MOST_BYTES = 2**18
MOST_VALUES = 50_000  # with every alias unfolded
MOST_LEVELS = 30
MERGE = "tag:yaml.org,2002:merge"


def parse(text: str, file: str) -> Any:
    """The values in a text of YAML 1.2.

    Args:
        file: what messages call it.

    Raises:
        LabError: when it is no YAML, has tags of its own, or unfolds to more than a study can have.
    """
    if len(text) > MOST_BYTES:
        raise LabError(f"{file}: Expected at most {MOST_BYTES:,} characters. Found: {len(text):,}.")
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(io.StringIO(text)) if text.strip("\ufeff \t\r\n") else None
        if node is None:
            return None
        _Limits(file, yaml).check(node, ())
        return yaml.constructor.construct_document(node)
    except RecursionError:
        raise LabError(f"{file}: Expected at most {MOST_LEVELS} levels. Found: more.") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise LabError(f"{file}{line}: Expected valid YAML 1.2. Found: {_problem(error)}.") from None
    except YAMLError as error:
        raise LabError(f"{file}: Expected valid YAML 1.2. Found: {_first_line(error)}.") from None


def find_lines(text: str) -> "Lines":
    """Where the values of a text that `parse` has read stand in it."""
    return Lines(YAML(typ="safe", pure=True).compose(io.StringIO(text)) if text else None)


class Lines:
    """Line numbers by place, such as `("model", "blocks", "block1")`."""

    def __init__(self, root: Node | None):
        self.root = root

    def of(self, place: tuple) -> int | None:
        """The line of a place's key, of the last one on the way to it that is there."""
        found = self._on_the_way(place)
        return found[-1] if found else None

    def has(self, place: tuple) -> bool:
        """Whether the whole place is in the text."""
        return len(self._on_the_way(place)) == len(place)

    def _on_the_way(self, place: tuple) -> list[int]:
        """The lines of a place's keys, as far as they are there."""
        node, lines = self.root, []
        for key in place:
            found = _inside(node, key) if node is not None else None
            if found is None:
                break
            line, node = found
            lines.append(line)
        return lines


def dotted(place: tuple) -> str:
    """A place as messages have it; keys that would not show as they are stand in quotes."""
    return ".".join(_name(key) for key in place) or "the file"


def listed(names: Iterable[Any], most: int = 40) -> str:
    """Names in a message, not more than `most`."""
    found = [_name(one) for one in names]
    return ", ".join(found[:most]) + (f" and {len(found) - most:,} more" if len(found) > most else "")


def _name(key: Any) -> str:
    text = str(key)
    return text if text.isprintable() and 0 < len(text) <= 64 else shown(text)


def _inside(node: Node, key: Any) -> tuple[int, Node] | None:
    """The line of a key of a mapping, or of an item of a list, and what stands there; also what `<<` merges into it."""
    if isinstance(node, MappingNode):
        for name, value in node.value:
            if isinstance(name, ScalarNode) and name.value == str(key) and name.tag != MERGE:
                return name.start_mark.line + 1, value
        for name, value in node.value:
            if name.tag == MERGE:
                for one in [value] if isinstance(value, MappingNode) else value.value:
                    if found := _inside(one, key):
                        return found
    elif not isinstance(node, ScalarNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark.line + 1, node.value[key]
    return None


class _Limits:
    """Looks at a document before anything is made of it."""

    def __init__(self, file: str, yaml: YAML):
        self.file, self.yaml = file, yaml
        self.sizes: dict[int, tuple[int, int]] = {}  # values and levels of a node, aliases unfolded
        self.open: set[int] = set()

    def check(self, node: Node, place: tuple) -> tuple[int, int]:
        """
        Returns:
            How many values there are in a node, itself included, and how many levels.
        """
        if id(node) in self.open:
            self._refuse(node, place, "values that don't contain themselves", "an alias of a mapping that it stands in")
        if id(node) in self.sizes:
            return self.sizes[id(node)]
        if isinstance(node, ScalarNode):
            self._check_scalar(node, place)
            return 1, 1
        self.open.add(id(node))
        inside = [self.check(key, place) for key, _ in node.value] if isinstance(node, MappingNode) else []
        inside += [self.check(value, (*place, key)) for key, value in _items(node)]
        self.open.remove(id(node))
        size, levels = 1 + sum(one for one, _ in inside), 1 + max((one for _, one in inside), default=0)
        if size > MOST_VALUES:
            self._refuse(node, place, f"at most {MOST_VALUES:,} values, what aliases stand for counted", f"{size:,}")
        if levels > MOST_LEVELS:
            self._refuse(node, place, f"at most {MOST_LEVELS} levels", str(levels))
        self.sizes[id(node)] = size, levels
        return size, levels

    def _check_scalar(self, node: ScalarNode, place: tuple) -> None:
        if node.tag == MERGE:
            return
        try:
            self.yaml.constructor.construct_object(node)
        except MarkedYAMLError:
            raise
        except Exception:  # ruamel has a KeyError, a ValueError, … for each tag that a value does not fit
            kind = str(node.tag).rpartition(":")[2]
            self._refuse(node, place, f"a value that can be read as {kind}", shown(node.value))

    def _refuse(self, node: Node, place: tuple, expected: str, found: str) -> None:
        line = node.start_mark.line + 1
        raise LabError(f"{self.file}, line {line}: {dotted(place)}: Expected {expected}. Found: {found}.")


def _items(node: Node) -> list[tuple[Any, Node]]:
    if isinstance(node, MappingNode):
        return [(key.value if isinstance(key, ScalarNode) else "?", value) for key, value in node.value]
    return list(enumerate(node.value))


def _problem(error: MarkedYAMLError) -> str:
    told = _first_line(error.problem)
    return f"{_first_line(error.context)} {told}" if told.startswith("but ") else told


def _first_line(problem: Any) -> str:
    """What ruamel says, without its drawing of the place."""
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "something else")
