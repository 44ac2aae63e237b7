"""The families of chat templates that have a name: data only.

A family is known by the marks that its template writes, whatever program writes them. The translation itself
(chat_reading.py, chat_translation.py) needs no family: one whose marks are in no row here is translated as
well, when it is of the common shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from qexport.ollama.chat_reading import Place, Reading


@dataclass(frozen=True)
class Family:
    """A name and its marks: texts in the start of a user's turn, in the start of an answer, in its end, and
    beside the system message. An empty mark says nothing; `places` are where the system message may stand."""

    name: str
    user: str
    answer: str = ""
    answer_end: str = ""
    system: str = ""
    places: tuple[Place, ...] = ()


# The first that fits is the name; the narrower ones stand before the wider.
FAMILIES = (
    Family("Phi-4", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    Family("ChatML", "<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"),
    Family("Llama 3.1", "<|start_header_id|>user", system="Cutting Knowledge Date:"),
    Family("Llama 3", "<|start_header_id|>user", "<|start_header_id|>assistant", "<|eot_id|>"),
    Family("Llama 4", "<|header_start|>user", "<|header_start|>assistant", "<|eot|>"),
    Family("Llama 2", "[INST] ", "[/INST]", system="<<SYS>>"),
    Family("Mistral v7", "[INST]", "[/INST]", system="[SYSTEM_PROMPT]"),
    Family("Mistral v3", "[INST]", "[/INST]", places=("last user",)),
    Family("Mistral v1", "[INST]", "[/INST]"),
    Family("Gemma", "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>"),
    Family("GLM-4", "<|user|>", "<|assistant|>", system="[gMASK]"),
    Family("Phi-3", "<|user|>", "<|assistant|>", "<|end|>"),
    Family("Zephyr", "<|user|>\n", "<|assistant|>", "</s>"),
    Family("Falcon 3", "<|user|>\n", "<|assistant|>\n", "<|endoftext|>"),
    Family("GLM-Edge", "<|user|>", "<|assistant|>"),
    Family("Command-R", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    Family("DeepSeek R1", "<｜User｜>", "<｜Assistant｜>"),
    Family("DeepSeek V2", "User: ", "Assistant:", "<｜end▁of▁sentence｜>"),
    Family("Granite 3", "<|start_of_role|>user<|end_of_role|>", "<|start_of_role|>assistant<|end_of_role|>"),
    Family("Granite code", "Question:\n", "Answer:\n"),
    Family("OpenChat", "GPT4 Correct User:", "GPT4 Correct Assistant:", "<|end_of_turn|>"),
    Family("Alpaca", "### Instruction", "### Response"),
    Family("Solar", "### User:", "### Assistant:"),
    Family("Vicuna", "USER:", "ASSISTANT:"),
    Family("Falcon", "User:", "Falcon:"),
    Family("ChatQA", "User: ", "Assistant:"),
    Family("Orion", "Human: ", "Assistant: "),
    Family("MiniCPM", "<用户>", "<AI>"),
    Family("Megrez", "<|role_start|>user<|role_end|>", "<|role_start|>assistant<|role_end|>"),
    Family("CodeLlama 70B", "Source: user\n", "Source: assistant\n"),
    Family("EXAONE 3", "[|user|]", "[|assistant|]"),
)


def family_name(reading: Reading) -> str | None:
    """The name of the family that has the marks of `reading`; None for marks of a model's own."""
    return next((family.name for family in FAMILIES if _fits(family, reading)), None)


def _fits(family: Family, reading: Reading) -> bool:
    around_system = reading.lead + reading.before_system + reading.without_system + reading.first_user_start
    return (
        family.user in reading.user_start
        and family.answer in reading.user_end + reading.assistant_start + reading.generate
        and family.answer_end in reading.assistant_end + reading.user_start
        and family.system in around_system
        and (not family.places or reading.system_place in family.places)
    )
