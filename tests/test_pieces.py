"""Prompts are put together from pieces, and have the tokens of running text all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tagllm.config import HeadConfig, SourceConfig
from tagllm.data.encode import Encoder
from tagllm.data.layout import TagLayout
from tagllm.data.pieces import lead_of, tokens_of
from tagllm.template import parse_template
from tests import tiny
from tests.test_encode import one

MERGES = [("▁", "C"), ("▁", "I"), ("▁I", "t"), ("i", "s"), ("▁", "is"), ("▁", "▁"), ("▁", ".")]


def sentencepiece(spaces: str) -> Any:
    """As those of Llama 2, Mistral and Phi 3, in the three ways in which their files say where spaces come from."""
    letters = [*"▁.,()ItisaCON", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *map("".join, MERGES)])
    vocabulary = {token: at for at, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if spaces == "prepended":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=spaces, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("spaces", ["prepended", "always", "first"])
@pytest.mark.parametrize(
    "template", ["It is {x}. It is <QED>", "{x}. It is {x}. <QED>", "It is ({x}). <QED>", "{x}.{x}. <QED>"]
)
def test_a_prompt_has_the_tokens_of_its_text(spaces: str, template: str) -> None:
    tokenizer = sentencepiece(spaces)
    layout = TagLayout.of(len(tokenizer), {"QED": "function"}, {"QED": 3}, ["QED"], {"QED": HeadConfig()})
    source = SourceConfig(path="a.csv", template=template, target="y")
    encoder = Encoder(parse_template(template, layout.kinds), source, layout, tokenizer, 200)
    example = one(encoder, x="CCO", y=1.0)
    text = template.replace("{x}", "CCO").removesuffix(" <QED>")
    wanted = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(example.ids[: len(wanted)].tolist()) == tokenizer.tokenize(text)


def test_tokenizers_without_a_space_of_their_own_are_asked_as_before(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path))
    assert lead_of(tokenizer) == ()
    assert tokens_of(tokenizer, [". It", ""]) == [tokenizer(". It", add_special_tokens=False).input_ids, []]
