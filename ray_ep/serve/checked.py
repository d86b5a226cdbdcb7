"""A checkpoint to generate from, before anything is started: what can be refused without a cluster is refused here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ray_ep.config.schema import Config
from ray_ep.driver.start import initial_placement
from ray_ep.errors import BadInput, DataError, ModelError
from ray_ep.moe import find_experts
from ray_ep.placement import Placement
from ray_ep.rank.data.tokenizer import load_decoder, load_tokenizer
from ray_ep.rank.model import meta_model, model_config
from ray_ep.rank.pretrained.load import inspect
from ray_ep.rank.saved.companions import has_tokenizer


@dataclass(frozen=True, slots=True)
class Text:
    """How text becomes tokens and tokens become text.

    Args:
        tokenizer: transformers' own; None: a token is a byte.
        vocabulary: that it needs of a model.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    tokenizer: Any
    vocabulary: int

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the model answers. Raises DataError: there is no chat template."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise DataError("messages need a chat template, and the checkpoint's tokenizer has none: give a prompt")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # a template may raise anything
            raise DataError(f"the checkpoint's chat template refuses the messages: {e}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True, slots=True)
class Checked:
    """A checkpoint whose files are whole and fit together.

    Args:
        eos: tokens that end an answer. context: most tokens that the model was made for; None: it does not say.
        notes: to tell when it starts.
    """

    config: PreTrainedConfig
    placement: Placement
    text: Text
    eos: tuple[int, ...]
    context: int | None
    notes: tuple[str, ...]


def check_checkpoint(cfg: Config) -> Checked:
    """Read everything of cfg.model.path but its weights; starts nothing.

    Raises:
        BadInput: no checkpoint, a damaged or truncated one, one without experts, one that needs code of its own, or a
            tokenizer that does not fit. The message says what, and where.
    """
    path = Path(cfg.model.path)
    if (path / "config.yaml").is_file():
        raise ModelError(
            f"{path} is the directory of a run: write its checkpoint as a transformers one first: "
            f"ray-ep export {path} OUT"
        )
    text = _text(cfg)
    config = model_config(cfg.model, text.vocabulary)
    model = meta_model(config)
    modules = find_experts(model)
    experts: int = next(iter(modules.values())).num_experts  # type: ignore[assignment]
    placement = initial_placement(cfg, len(modules), experts)
    notes = [words for _, words in inspect(path, model)]
    if text.tokenizer is None:
        notes.append(f"{path} has no tokenizer: a token is a byte")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Checked(config, placement, text, _eos(path, config, text), context, tuple(notes))


def _text(cfg: Config) -> Text:
    name = cfg.data.tokenizer
    if name == "bytes" and has_tokenizer(Path(cfg.model.path)):
        name = cfg.model.path
    decode = load_decoder(name)
    if name == "bytes":
        return Text(lambda text: list(text.encode()), decode, None, 256)
    tokenizer, vocabulary = load_tokenizer(name)
    return Text(lambda text: list(tokenizer.encode(text)), decode, tokenizer, vocabulary)


def _eos(path: Path, config: PreTrainedConfig, text: Text) -> tuple[int, ...]:
    """Tokens that end an answer: as generation_config.json says, else config.json, else the tokenizer."""
    file = path / "generation_config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as e:
        raise BadInput(f"{file}: not the JSON that transformers writes: {e}") from None
    text_config = config.get_text_config()
    own = 0 if text.tokenizer is None else text.tokenizer.eos_token_id  # 0 ends a document of bytes
    said = next((s for s in (said, getattr(text_config, "eos_token_id", None), own) if s is not None), ())
    ids = (said,) if isinstance(said, int) else tuple(said)
    return tuple(i for i in ids if 0 <= i < text_config.vocab_size)
