"""Which tokens open and close texts, turns and gaps, and the chat template, as GGUF settings.

The ids are the tokenizer's own, then generation_config.json's and config.json's, as transformers looks them
up. Whether a text gets an opening and a closing token is not believed but tried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import CONFIG_FILE, read_json
from qexport.checkpoint.disk import is_file
from qexport.formats.gguf.container import Metadata, array, boolean, text, u32

GENERATION_FILE = "generation_config.json"
# Texts that close a turn, and llama.cpp's own list of texts that end a generation (llama-vocab.cpp, load).
_TURN_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|end_of_turn|>", "<|endofturn|>"),
    *("<|eot|>", "<|EOT|>", "<EOT>", "[EOT]", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<end_of_utterance>"),
)
_MESSAGE_ENDS = ("<|eom_id|>", "<|eom|>")
_ENDS_BY_NAME = frozenset(
    {
        *(
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "</s>",
        ),
        *(
            "<|eom_id|>",
            "<EOT>",
            "[EOT]",
            "[EOS]",
            "<|end_of_text|>",
            "<end_of_utterance>",
            "<eos>",
            "<turn|>",
        ),
    }
)
# The gap-filling tokens of code models: setting -> texts (Qwen, StarCoder, Granite, DeepSeek, Code Llama,
# GLM).
_GAPS: Mapping[str, tuple[str, ...]] = {
    "FIM_PRE_ID": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "▁<PRE>",
        "<|code_prefix|>",
    ),
    "FIM_SUF_ID": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "▁<SUF>",
        "<|code_suffix|>",
    ),
    "FIM_MID_ID": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "▁<MID>",
        "<|code_middle|>",
    ),
    "FIM_PAD_ID": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>"),
    "FIM_REP_ID": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
    "FIM_SEP_ID": ("<|file_sep|>",),
}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids by role (None: there is none), whether texts are opened and closed, and what the user should
    know."""

    bos: int | None
    eos: int | None
    unknown: int | None
    separator: int | None
    padding: int | None
    mask: int | None
    turn_end: int | None
    message_end: int | None
    gaps: Mapping[str, int]  # by the name of gguf's key
    adds_bos: bool
    adds_eos: bool
    notes: tuple[str, ...] = ()

    @property
    def ids(self) -> frozenset[int]:
        """All that have a role."""
        one = (self.bos, self.eos, self.unknown, self.separator, self.padding, self.mask)
        other = (self.turn_end, self.message_end, *self.gaps.values())
        return frozenset(number for number in (*one, *other) if number is not None)

    def metadata(self) -> Metadata:
        """The settings `tokenizer.ggml.*_token_id` and `add_*_token`."""
        from gguf import Keys

        keys = Keys.Tokenizer
        roles = {
            keys.BOS_ID: self.bos,
            keys.EOS_ID: self.eos,
            keys.UNK_ID: self.unknown,
            keys.SEP_ID: self.separator,
            keys.PAD_ID: self.padding,
            keys.MASK_ID: self.mask,
            keys.EOT_ID: self.turn_end,
            keys.EOM_ID: self.message_end,
            **{getattr(keys, name): number for name, number in self.gaps.items()},
        }
        found: Metadata = {key: u32(number) for key, number in roles.items() if number is not None}
        found[keys.ADD_BOS] = boolean(self.adds_bos)
        found[keys.ADD_EOS] = boolean(self.adds_eos)
        return found


def special_tokens(
    tokenizer: Any, directory: Path, ids: Mapping[str, int], template: Mapping[str, str]
) -> SpecialTokens:
    """The roles in the vocabulary `ids` (text -> id) of transformers' `tokenizer`, beside the model in
    `directory`."""
    rows = frozenset(ids.values())
    configs = [
        read_json(directory / name) for name in (GENERATION_FILE, CONFIG_FILE) if is_file(directory / name)
    ]
    prefix, suffix = _what_is_added(tokenizer)
    notes: list[str] = []
    bos = _first(rows, tokenizer.bos_token_id, *(config.get("bos_token_id") for config in configs))
    ends = _all(rows, tokenizer.eos_token_id, *(config.get("eos_token_id") for config in configs))
    adds_bos, adds_eos = bool(prefix), bool(suffix)
    if len(prefix) == 1 and prefix[0] != bos:
        bos = prefix[0]  # llama.cpp opens a text with this id and no other
    elif len(prefix) > 1:
        adds_bos = prefix[0] == bos
        notes.append(f"transformers opens each text with the ids {prefix}; llama.cpp can do so with one only")
    if suffix and (len(suffix) > 1 or suffix[0] not in ends):
        adds_eos = False
        notes.append(f"transformers closes each text with the ids {suffix}, which llama.cpp does not do")
    elif suffix:
        ends = [suffix[0], *(number for number in ends if number != suffix[0])]
    eos = ends[0] if ends else None
    used = "\n".join(template.values())
    rest = [number for number in ends if number != eos]
    turn = next(
        (ids[name] for name in _TURN_ENDS if name in ids and (ids[name] in ends or name in used)), None
    )
    message = next((ids[name] for name in _MESSAGE_ENDS if name in ids), None)
    turn, message, left = _ends_by_id(eos, turn, message, rest, ids)
    if left:
        notes.append(f"llama.cpp stops at three ids, not at these of generation_config.json: {left}")
    return SpecialTokens(
        bos=eos if bos is None else bos,  # without one llama.cpp takes 11
        eos=eos,
        unknown=_first(rows, tokenizer.unk_token_id),
        separator=_first(rows, tokenizer.sep_token_id),
        padding=_first(rows, tokenizer.pad_token_id, *(config.get("pad_token_id") for config in configs)),
        mask=_first(rows, tokenizer.mask_token_id),
        turn_end=turn,
        message_end=message,
        gaps={key: ids[name] for key, names in _GAPS.items() for name in reversed(names) if name in ids},
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        notes=tuple(notes),
    )


def chat_templates(tokenizer: Any) -> dict[str, str]:
    """The templates by name, as transformers loads them: chat_template.jinja and additional_chat_templates,
    else tokenizer_config.json's."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, str):
        return {"default": found}
    return {str(name): str(template) for name, template in (found or {}).items()}


def template_metadata(templates: Mapping[str, str]) -> Metadata:
    """`tokenizer.chat_template` for the default one, one setting more for each other, and their names."""
    from gguf import Keys

    keys = Keys.Tokenizer
    found: Metadata = {}
    others = {name: template for name, template in templates.items() if name != "default"}
    if others:
        found[keys.CHAT_TEMPLATES] = array("str", others)
        found |= {keys.CHAT_TEMPLATE_N.format(name=name): text(template) for name, template in others.items()}
    if "default" in templates:
        found[keys.CHAT_TEMPLATE] = text(templates["default"])
    return found


def _what_is_added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _ends_by_id(
    eos: int | None, turn: int | None, message: int | None, rest: Sequence[int], ids: Mapping[str, int]
) -> tuple[int | None, int | None, list[int]]:
    """llama.cpp stops at eos, turn end and message end, and at some texts by their name: where
    generation_config.json has other ends than these, they take the places that are free. Third: the ends that
    no place is left for."""
    by_name = {ids[name] for name in _ENDS_BY_NAME if name in ids}
    left = [number for number in rest if number not in by_name | {eos, turn, message}]
    if left and turn is None:
        turn = left.pop(0)
    if left and message is None:
        message = left.pop(0)
    return turn, message, left


def _first(rows: frozenset[int], *found: Any) -> int | None:
    several = _all(rows, *found)
    return several[0] if several else None


def _all(rows: frozenset[int], *found: Any) -> list[int]:
    """The ids among what was found (a number, a list of numbers, None), in order, each once."""
    flat: list[Any] = []
    for item in found:
        flat.extend(item if isinstance(item, list) else [item])
    return list(
        dict.fromkeys(n for n in flat if isinstance(n, int) and not isinstance(n, bool) and n in rows)
    )
