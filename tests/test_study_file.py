import textwrap

import pytest
from mutations import BOMB, CHAIN, MERGED

from ablation_lab import study_file
from ablation_lab.errors import LabError


def test_aliases_and_merge_keys_are_read_and_found():
    text = textwrap.dedent("""\
        base: &base {units: 4}
        head:
          one: *base
          two:
            <<: *base
            dropout: 0.1
        """)
    assert study_file.parse(text, "x")["head"] == {"one": {"units": 4}, "two": {"units": 4, "dropout": 0.1}}
    lines = study_file.find_lines(text)
    assert lines.of(("head", "two", "dropout")) == 6
    assert lines.of(("head", "two", "units")) == 1  # where it is written
    assert lines.of(("head", "two", "unit")) == 4  # the last thing on the way that is there
    assert lines.of(("nothing",)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "x, line 1: a.0: Expected values that don't contain themselves."),
        ("a:\n  b: &b\n    c: *b", "x, line 2: a.b.c: Expected values that don't contain themselves."),
        (BOMB, "Expected at most 50,000 values, what aliases stand for counted. Found: 66,430."),
        (MERGED, "Expected at most 50,000 values, what aliases stand for counted."),
        (CHAIN, "x, line 30: a29: Expected at most 30 levels. Found: 31."),
        ("[" * 2000, "x: Expected at most 30 levels. Found: more."),
        ("x: " + "y" * 300_000, "x: Expected at most 262,144 characters. Found: 300,003."),
        ("a: !!bool maybe", 'x, line 1: a: Expected a value that can be read as bool. Found: "maybe".'),
        ("a:\n  b: " + "9" * 5000, "x, line 2: a.b: Expected a value that can be read as int. Found: "),
        (
            "a: 1\n---\nb: 2",
            "x, line 2: Expected valid YAML 1.2. Found: expected a single document in the stream but found another",
        ),
    ],
)
def test_what_is_no_studys_text_is_told(text: str, message: str):
    with pytest.raises(LabError) as caught:
        study_file.parse(text, "x")
    assert message in str(caught.value)


def test_keys_and_values_stand_in_messages_as_one_printable_line():
    assert study_file.dotted(("model", "a\nb", 3, "\x1b[31m")) == 'model."a\\nb".3."\\u001b[31m"'
    assert study_file.dotted(("x" * 100,)).endswith('..."') or len(study_file.dotted(("x" * 100,))) <= 82
    assert study_file.dotted(()) == "the file"
    assert len(study_file.shown("x" * 1000)) == 80
    assert study_file.listed(map(str, range(50)), most=3) == "0, 1, 2 and 47 more"
