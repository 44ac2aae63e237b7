"""What can be refused of a GGUF export by its options alone, and which types the user names for tensors."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.errors import SpecError, first_of
from qexport.events import Noted, OnEvent
from qexport.formats.gguf.mixes import Mix, fallback, needs_importance, quantizable
from qexport.grids.ggml.grid import GgmlGrid
from qexport.grids.ggml.types import TYPES, BlockType, block_type
from qexport.quantization.choice import require_match
from qexport.specs import AnyQuantizeSpec, CalibrationSpec, ImportanceSpec

_SOLVERS = ("search", "importance", "gptq", "awq", "awq+gptq")
_NOT_FOR_GGUF = ("group_size", "symmetric", "quant_type", "double_quant", "lm_head", "embeddings")


def check_options(spec: AnyQuantizeSpec) -> None:
    """Raises SpecError for options that GGUF has no use for, or that contradict each other."""
    if planned := spec.budget or (spec.plan and "plan"):
        flag = "bits" if planned == "average_bits" else planned.replace("_", "-")
        raise SpecError(
            f"--{flag} {getattr(spec, planned)} with gguf",
            expected="--type, whose mixes give more bits to what needs them, such as q3_k_m; or --override",
        )
    if spec.solver not in _SOLVERS:
        raise SpecError(
            f"--solver {spec.solver} with gguf",
            expected=f"one of {', '.join(_SOLVERS)}: its types bring a search of scales of their own",
        )
    for name in _NOT_FOR_GGUF:
        if getattr(spec, name) != type(spec).model_fields[name].default:
            raise SpecError(
                f"--{name.replace('_', '-')} with gguf",
                expected="--type, which settles every tensor, such as q4_k_m; --override for some",
            )
    given = spec.model_fields_set & set(CalibrationSpec.TEXT)
    if isinstance(spec, ImportanceSpec) and spec.imatrix is not None and given:
        raise SpecError(
            f"--{min(given).replace('_', '-')} beside --imatrix, which stands for a calibration already",
            expected="one of the two",
        )


def check_solver(
    spec: AnyQuantizeSpec,
    mix: str,
    grids: Mapping[str, GgmlGrid],
    fused: Mapping[str, BlockType],
    on_event: OnEvent,
) -> None:
    """Whether GPTQ or AWQ can do something for the types that a mix comes to; what they cannot is noted.

    `grids` are those of the layers that they see, `fused` the types of experts that lie fused on disk, which
    they do not. Raises SpecError.
    """
    whole = [layer for layer, grid in grids.items() if not grid.has_lines]
    if whole and spec.solver != "gptq":
        kind = grids[whole[0]].type
        raise SpecError(
            f"--solver {spec.solver} with {mix}: {kind.name} of {whole[0]} has no codes to be rounded "
            "one by one",
            expected="--solver importance, or a type such as q2_k, q4_k_m or iq4_xs",
        )
    for name, type_ in fused.items():
        if type_.needs_importance:
            raise SpecError(
                f"--solver {spec.solver} with {mix}: {name} becomes {type_.name}, which needs importance, "
                "and what goes into experts that lie fused is not seen",
                expected="--solver importance, or a type such as q2_k",
            )
    if whole:
        on_event(
            Noted(
                f"{mix}: {len(whole)} layers get types without codes to be rounded one by one, and are "
                f"searched by importance, without error feedback: {first_of(whole, 2)}"
            )
        )
    if fused:
        on_event(
            Noted(
                f"{mix}: {len(fused)} tensors of experts that lie fused are encoded without data: "
                f"{first_of(list(fused), 2)}; --solver importance sees their inputs"
            )
        )


def hungry(mix: Mix, name: str, kind: BlockType) -> bool:
    """Whether a tensor needs importance: as llama.cpp has it, and where its type cannot do without."""
    return kind.needs_importance or needs_importance(mix, name, kind)


def chosen_types(spec: AnyQuantizeSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, BlockType]:
    """The types that the user named, by tensor; --skip is an override to f16. Raises SpecError."""
    names = [name for name, shape in shapes.items() if quantizable(name, shape)]
    found: dict[str, BlockType] = {}
    for text in spec.override:
        pattern, wanted = _parse_override(text)
        for name in require_match("--override", text, pattern, names):
            if fallback(wanted, shapes[name][-1]) is not wanted:
                raise SpecError(
                    f"--override {text!r}: rows of {name} have {shapes[name][-1]} weights",
                    expected=f"a multiple of {wanted.values} for {wanted.name}",
                    remedy="a type of smaller blocks, such as q8_0, q5_0 or iq4_nl",
                )
            found[name] = wanted
    for pattern in spec.skip:
        for name in require_match("--skip", pattern, pattern, names):
            found[name] = TYPES["f16"]
    return found


def _parse_override(text: str) -> tuple[str, BlockType]:
    pattern, equals, kind = text.rpartition("=")
    if not (pattern and equals):
        raise SpecError(
            f"--override {text!r}",
            expected="'PATTERN=TYPE' with gguf, the pattern over its names of tensors",
            remedy="for example 'blk.*.ffn_down=q6_k'",
        )
    try:
        return pattern, block_type(kind)
    except SpecError as error:
        raise SpecError(
            f"--override {text!r}: {error.found}", expected=error.expected, remedy=error.remedy
        ) from error
