"""Packaging. `kernels/`, `training/`, `benchmarks/` and `recipes/` live at the top level for readers, and install
inside the package: a top-level module called `kernels` would shadow the Hugging Face package of that name."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "exo_fast" / "version.py").read_text().split('"')[1]

FOLDERS = {"exo_fast": "exo_fast"} | {
    f"exo_fast.{name}": name for name in ("kernels", "training", "benchmarks", "recipes")
}


def packages_of(name: str, folder: str) -> list[str]:
    """Return a package and those below it; exo_fast/kernels is a link to kernels/, by which a checkout finds them."""
    return [name, *(f"{name}.{below}" for below in find_packages(str(HERE / folder), exclude=["kernels*"]))]


# A package index shows the README without the files next to it, so a link to such a file is replaced by its text.
DESCRIPTION = re.sub(r"!?\[([^]]*)\]\((?!https?://)[^)]*\)", r"\1", (HERE / "README.md").read_text())

TRAIN = [
    "transformers>=5.9",  # training/trainer/compat.py asks for what StageTrainer overrides
    "accelerate>=1.1",
    "deepspeed>=0.18",
    "peft>=0.17",
    "datasets>=4.0",
    "tensorboard>=2.15",
    "tqdm>=4.60",
    "pyyaml>=6.0",
    "jinja2>=3.1",
    "tabulate>=0.9",
]
TRL = ["trl>=1.15,<1.17"]  # the trainer class overrides methods that TRL moves between minor versions
TRACKING = ["wandb>=0.20"]
EXAMPLES = [*TRAIN, "lightning>=2.5"]
DEMO = [*TRAIN, "gguf>=0.10", "matplotlib>=3.8", "scipy>=1.11"]
BENCH = [
    *DEMO,
    *TRL,
    "pytest>=8.0",
    "pytest-benchmark>=5.0",
    "psutil>=5.9",
    "cut-cross-entropy>=25.1",
    "liger-kernel>=0.7",
]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]
COMPLETION = ["shtab>=1.7"]
TEST = ["pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100", "psutil>=5.9"]
DEV = [
    *DEMO,
    *TRL,
    *TRACKING,
    *EXAMPLES,
    *DOCS,
    *COMPLETION,
    *TEST,
    "ruff>=0.9",
    "import-linter>=2.5",
    "mypy>=1.15",
    "types-PyYAML>=6.0",
    "build>=1.2",
    "nvidia-matmul-heuristics==0.1.0.27; platform_system == 'Linux'",  # other versions, other predictions
]

setup(
    name="exo_fast",
    version=VERSION,
    description="EXO and DPO over K candidates per prompt, with the vocabulary projection fused into the loss",
    long_description=DESCRIPTION,
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "training/reports/uplot/LICENSE"],
    keywords=["alignment", "preference optimization", "EXO", "DPO", "RLHF", "language models", "PyTorch", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=[package for name, folder in FOLDERS.items() for package in packages_of(name, folder)],
    package_data={
        "exo_fast": ["py.typed"],
        "exo_fast.kernels.tuned": ["*.json"],
        "exo_fast.recipes": ["*.yaml"],
        "exo_fast.training.reports": ["templates/*", "uplot/*"],
    },
    install_requires=["torch>=2.9", "numpy>=1.26", "packaging>=24.0", "triton>=3.4; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        "trl": TRL,
        "tracking": TRACKING,
        "completion": COMPLETION,
        "flash": ["flash-attn>=2.7"],
        "examples": EXAMPLES,
        "demo": DEMO,
        "bench": BENCH,
        "docs": DOCS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["exo-fast = exo_fast.training.cli:main"]},
)
