"""Which layers the user's patterns choose, and what is said of patterns that are wrong."""

from __future__ import annotations

import pytest

from qexport.errors import SpecError
from qexport.quantization.choice import Override, chosen_bits, matching, parse_override, skipped

NAMES = [f"model.layers.{n}.{part}" for n in (0, 1, 10) for part in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0.*=8", Override("model.layers.0.*", 8)),
        ("*.down_proj=2:-1", Override("*.down_proj", 2, -1)),
        ("*=16", Override("*", 16)),
        ("a=b=3:64", Override("a=b", 3, 64)),
    ],
)
def test_an_override_is_a_pattern_and_bits(text: str, expected: Override) -> None:
    assert parse_override(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text", ["", "*", "=8", "*=", "*=nine", "*=9", "*=0", "*=-4", "*=4:", "*=4:x", "*=²"]
)
def test_what_is_no_override_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SpecError, match=r"PATTERN=BITS") as raised:
        parse_override(text)
    assert "\n" not in str(raised.value)


def test_a_pattern_matches_whole_names_and_modules_that_hold_them() -> None:
    assert matching("model.layers.1.*", NAMES) == NAMES[2:4]
    assert matching("model.layers.1", NAMES) == NAMES[2:4]  # not layer 10
    assert matching("*.q_proj", NAMES) == NAMES[::2]
    assert matching("q_proj", NAMES) == []
    assert matching("*.layers.[01].*", NAMES) == NAMES[:4]


def test_the_last_override_that_matches_counts() -> None:
    chosen = chosen_bits(NAMES, ["*=3", "model.layers.10.*=8:32", "*.10.mlp.*=16"])
    assert [chosen[name].bits for name in NAMES] == [3, 3, 3, 3, 8, 16]
    assert chosen[NAMES[4]].group_size == 32


def test_a_pattern_that_matches_nothing_is_refused_with_a_name_that_would() -> None:
    with pytest.raises(SpecError, match=r"--override 'model.layer.0.\*=8' matches no .* model\.layers\.0"):
        chosen_bits(NAMES, ["model.layer.0.*=8"])
    with pytest.raises(SpecError, match=r"--skip 'lm_head' matches no"):
        skipped(NAMES, ["lm_head"], [])


def test_skipping_what_is_left_anyway_is_no_mistake() -> None:
    assert skipped(NAMES, ["lm_head"], ["lm_head"]) == set()
    assert skipped(NAMES, ["*.0.*", "lm_head"], ["lm_head"]) == set(NAMES[:2])
