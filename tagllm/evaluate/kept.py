"""Answers to prompts without tags, kept: every seed of a tag is compared with the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tagllm.build import Built
from tagllm.config import digest_of
from tagllm.evaluate.generate import generate
from tagllm.files import DamagedFile, cache_folder, json_bytes, read_json, write_whole, writing
from tagllm.model.loading import is_sharded
from tagllm.origin import code_digest, hardware, versions
from tagllm.ranks import Ranks

Ask = Callable[[Built, Sequence[NDArray[np.int32]]], list[str]]


def generate_of(built: Built, prompts: Sequence[NDArray[np.int32]], ranks: Ranks) -> list[str]:
    """The text behind each prompt, as the run's settings want it."""
    settings = built.config.evaluation
    return generate(
        built.model, built.backbone.tokenizer, prompts, settings.max_new_tokens, settings.beams,
        settings.rows_per_batch, ranks,
    )  # fmt: skip


def generate_once(built: Built, prompts: Sequence[NDArray[np.int32]], ranks: Ranks) -> list[str]:
    """`generate_of`, or what it gave before for the same prompts, if no tag stands in them: with the same backbone,
    settings, code, libraries, hardware and number of ranks. What rank 0 has kept is everybody's."""
    if any((ids >= built.layout.vocabulary_size).any() for ids in prompts):
        return generate_of(built, prompts, ranks)
    settings = built.config.evaluation.model_dump(mode="json", include={"max_new_tokens", "beams", "rows_per_batch"})
    backbone, quantize = built.backbone, built.config.backbone.quantize
    loaded = [quantize, backbone.dtype, backbone.attention, ranks.size, is_sharded(backbone.model)]
    asked = [ids.tolist() for ids in prompts]
    digest = digest_of([asked, settings, backbone.identity, loaded, code_digest(), versions(), hardware()])
    file = cache_folder() / f"answers-{digest}.json"

    def kept() -> list[str] | None:
        try:
            found: list[str] = read_json(file)["texts"]
        except DamagedFile:  # or not there
            return None
        return found

    def keep() -> None:
        with writing(file.parent):
            write_whole(file, json_bytes({"texts": texts}))

    texts = ranks.on_rank_zero(kept)
    if texts is None:
        texts = generate_of(built, prompts, ranks)
        ranks.on_rank_zero(keep)
    return texts
