"""The block mask is the one that is drawn in the docstring of `seen`."""

from __future__ import annotations

import re
from typing import Any

import torch

from tagllm.config import SourceConfig
from tagllm.data.encode import Encoder, Example
from tagllm.data.layout import TagLayout
from tagllm.model.masks import seen
from tagllm.template import parse_template
from tests import tiny


class Words:
    """A tokenizer of one id a word, with a token that begins every text."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, texts: Any, add_special_tokens: bool = True, split_special_tokens: bool = False) -> Any:
        ids = [[self.bos_token_id] * add_special_tokens + [3 + len(word) for word in text.split()] for text in texts]
        return type("Encoding", (), {"input_ids": ids if isinstance(texts, list) else ids[0]})()


def test_a_prompt_is_seen_as_it_is_drawn() -> None:
    lines = [line.split() for line in (seen.__doc__ or "").splitlines()]
    head, *rows = [words for words in lines if len(words) > 1 and re.fullmatch(r"\w( [\w.])+", " ".join(words))]
    prompt = re.search(r"`<s>(.*?)`", seen.__doc__ or "")
    assert prompt is not None and [row[0] for row in rows] == head
    drawn = torch.tensor([[cell == "1" for cell in row[1:]] for row in rows])
    of = TagLayout.of(tiny.VOCABULARY, {"D": "domain"}, {"D": 1}, (), {})
    template = parse_template(prompt[1], of.kinds)
    (row,) = Encoder(template, SourceConfig(path="x.csv", template=prompt[1]), of, Words(), 100).encode([{"x": "x x"}])
    assert isinstance(row, Example)
    span_S = torch.zeros(len(row.ids), dtype=torch.long)
    for number, (start, end) in enumerate(row.spans_at, 1):
        span_S[start:end] = number
    at_S = torch.arange(len(row.ids))
    assert seen(at_S[None], span_S[None], at_S[None], span_S[None], None)[0].equal(drawn)
