"""The methods Tag-LLM is compared with (section 4 of the paper), each with a head of its own."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """`rates`: learning rates to begin with. `virtual`: learns rows in front of the prompt, else low-rank updates."""

    key: str
    name: str
    rates: tuple[float, ...]
    virtual: bool
    names_domains: bool
    """The name of each domain tag stands as text where the tag stood."""


METHODS = {
    method.key: method
    for method in (
        Method("prompt_tuning", "prompt tuning + head", (1e-3, 3e-3, 1e-2), virtual=True, names_domains=False),
        Method("lora", "LoRA + head", (1e-4, 3e-4, 1e-3), virtual=False, names_domains=False),
        Method("lora_text", "LoRA + head + domain as text", (1e-4, 3e-4, 1e-3), virtual=False, names_domains=True),
    )
}
