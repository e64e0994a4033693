"""Token ids of the pieces that prompts are put together from, each cut as in running text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

BREAK = "\n"
"""Tokenizers join nothing to what stands in front of it."""


def tokens_of(tokenizer: Any, texts: Sequence[str], literal: bool = False, begins: bool = False) -> list[list[int]]:
    """Ids of each text, without those of its beginning or end.

    SentencePiece (Llama 2, Mistral, Phi 3) begins every text with a space, which a piece in the middle of a prompt has
    only where it is written: `. Its` behind a value is not ` . Its`.

    Args:
        literal: values of the data, in which `</s>` is a word; in fixed text it may be meant.
        begins: the piece is what a prompt begins with.
    """
    if not texts:
        return []
    lead = () if begins else lead_of(tokenizer)
    shown = [BREAK + text if lead else text for text in texts]
    found: list[list[int]] = tokenizer(shown, add_special_tokens=False, split_special_tokens=literal).input_ids
    return [ids[len(lead) :] for ids in found]


@lru_cache(maxsize=8)
def lead_of(tokenizer: Any) -> tuple[int, ...]:
    """The ids of a line break where texts behind one are cut otherwise than alone; elsewhere none."""
    alone, behind, lead = (tokenizer(text, add_special_tokens=False).input_ids for text in (".", f"{BREAK}.", BREAK))
    return tuple(lead) if behind[: len(lead)] == lead and behind[len(lead) :] not in ([], alone) else ()
