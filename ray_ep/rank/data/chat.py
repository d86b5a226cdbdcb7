"""A conversation -> its tokens, by the tokenizer's own chat template, and which of them the assistant said.

Where the template marks what the assistant says ({% generation %}) its marks count; elsewhere a turn is what the
template adds when the turn is added to the prompt before it. Knows nothing of files.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ray_ep.errors import DataError, brief


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        name: of the tokenizer, as data.tokenizer has it.

    Raises:
        DataError: it has no chat template.
    """

    def __init__(self, tokenizer: Any, name: str):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"data.tokenizer={name!r} has no chat template, which data.format=chat needs: give the tokenizer of a "
                "model that was trained on conversations, or put a chat_template.jinja beside the tokenizer"
            )
        self.tokenizer, self.name = tokenizer, name
        templates = tokenizer.chat_template
        whole = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
        self.marks = "generation" in whole and "endgeneration" in whole

    def encode(self, document: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 [n] of a conversation as `Messages` gives it, and bool [n] which of them the assistant said.

        Raises:
            DataError: the template refuses the conversation, or does not let its turns be told apart.
        """
        said = json.loads(document)
        messages, tools = said["messages"], said["tools"]
        if self.marks:
            found = self._apply(messages, tools, where, return_assistant_tokens_mask=True)
            ids, spoken = found["input_ids"], np.array(found["assistant_masks"], np.bool_)
            return np.array(ids, np.int64), spoken
        ids = self._apply(messages, tools, where)["input_ids"]
        spoken = np.zeros(len(ids), np.bool_)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:turn], tools, where, add_generation_prompt=True)["input_ids"]
            after = self._apply(messages[: turn + 1], tools, where)["input_ids"]
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise DataError(
                    f"{where}: the chat template of data.tokenizer={self.name!r} writes what comes before message "
                    f"{turn + 1} otherwise once it is there, so the assistant's tokens cannot be told from others: "
                    "give a template that has {% generation %} around what the assistant says, or one assistant turn "
                    "a conversation"
                )
            spoken[len(before) : len(after)] = True
        return np.array(ids, np.int64), spoken

    def _apply(self, messages: list[Any], tools: Any, where: str, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True, **options)
        except Exception as e:  # templates are programs: they raise what they like
            raise DataError(
                f"{where}: the chat template of data.tokenizer={self.name!r} refuses it: {brief(e)}"
            ) from None
