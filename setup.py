"""Packaging. `kernels/`, `training/`, `benchmarks/` and `recipes/` live at the top level for readers, and install
inside the package: a top-level module called `kernels` would shadow the Hugging Face package of that name."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = (HERE / "exo_fast" / "version.py").read_text().split('"')[1]

TRAIN = [
    "transformers>=5.23",  # StageTrainer overrides methods of its Trainer that earlier versions divide differently
    "accelerate>=1.1",
    "deepspeed>=0.18",
    "peft>=0.17",
    "datasets>=4.0",
    "tensorboard>=2.15",
    "tqdm>=4.60",
    "pyyaml>=6.0",
]
DEMO = [*TRAIN, "gguf>=0.10", "matplotlib>=3.8", "scipy>=1.11"]
BENCH = [
    *DEMO,
    "pytest>=8.0",
    "pytest-benchmark>=5.0",
    "psutil>=5.9",
    "trl>=1.0",
    "cut-cross-entropy>=25.1",
    "liger-kernel>=0.7",
]
DEV = [*DEMO, "pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100", "psutil>=5.9", "ruff>=0.9"]

setup(
    name="exo_fast",
    version=VERSION,
    description="EXO and DPO over K candidates per prompt, with the vocabulary projection fused into the loss",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={
        "exo_fast": "exo_fast",
        "exo_fast.kernels": "kernels",
        "exo_fast.training": "training",
        "exo_fast.benchmarks": "benchmarks",
        "exo_fast.recipes": "recipes",
    },
    packages=[
        "exo_fast",
        "exo_fast.backends",
        "exo_fast.kernels",
        "exo_fast.training",
        "exo_fast.training.data",
        "exo_fast.benchmarks",
        "exo_fast.recipes",
    ],
    package_data={"exo_fast": ["py.typed"], "exo_fast.recipes": ["*.yaml"]},
    install_requires=["torch>=2.9", "numpy>=1.26", "triton>=3.4; platform_system == 'Linux'"],
    extras_require={"train": TRAIN, "demo": DEMO, "bench": BENCH, "dev": DEV, "flash": ["flash-attn>=2.7"]},
    entry_points={"console_scripts": ["exo-fast = exo_fast.training.cli:main"]},
)
