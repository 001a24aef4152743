"""Run what docs/integrations.md recommends, with tiny random models, and tell what works with the installed packages.

    python scripts/check_integrations.py
    python scripts/check_integrations.py --only TRL peft --output results/integrations.json

Each check makes sure that the sparse attention really ran: that fewer pairs were read than there are, or that the
result is that of the specification and not the dense one. Packages that are not installed are told; the exit status is
1 if a check fails.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

# Before what loads huggingface_hub: it says that nothing may reach for the network.
from tiny_sparse_model import (
    LENGTHS,
    STEPS,
    assert_close,
    assert_other,
    byte_tokenizer,
    load,
    logits,
    run,
    save_tiny_model,
    sparse_forwards,
    texts,
    tokens,
    training_arguments,
)

# isort: split
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import hf_sparse_attn
from hf_sparse_attn.cli.argument_types import output_file
from hf_sparse_attn.cli.arguments import print_table
from hf_sparse_attn.cli.eval_tasks import LM_EVAL_PATH
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.errors import one_line
from hf_sparse_attn.output_files import write_json


class Check(NamedTuple):
    """A recipe: its name, the distribution that it needs (None: this package's own), and what runs it."""

    name: str
    package: str | None
    run: Callable[[Path], str]


CHECKS: list[Check] = []


def check(name: str, package: str | None = None) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """A function of a directory with a tiny model, which returns what it saw and raises AssertionError."""

    def add(run: Callable[[Path], str]) -> Callable[[Path], str]:
        CHECKS.append(Check(name, package, run))
        return run

    return add


class Losses(TrainerCallback):
    """The loss of each step as Trainer logs it."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.found.append(logs["loss"])


@check("trust_remote_code=True")
def remote_code(directory: Path) -> str:
    told: list[str] = []
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float64).eval()
    with sparse_forwards(model, told):
        found = logits(model)
    assert_close(found, logits(load(directory)))
    return told[0]


def sft_losses(directory: Path, attn_implementation: str, **settings: Any) -> list[float]:
    """The losses of TRL's SFTTrainer over the same four documents in every step."""
    from trl import SFTConfig, SFTTrainer

    documents = [{"input_ids": tokens(length, seed=length).tolist()} for length in LENGTHS]
    arguments = training_arguments(
        directory,
        model_init_kwargs={"attn_implementation": attn_implementation, "dtype": "float32"},
        per_device_train_batch_size=len(documents),
        dataset_num_proc=None,
    )
    losses, told = Losses(), []
    trainer = SFTTrainer(
        str(directory),
        args=SFTConfig(**arguments | settings),
        train_dataset=Dataset.from_list(documents),
        processing_class=byte_tokenizer(),
        callbacks=[losses],
    )
    with sparse_forwards(trainer.model, told, attn_implementation):
        trainer.train()
    assert len(losses.found) == STEPS, f"{len(losses.found)} losses"
    return losses.found


def check_sft(directory: Path, **settings: Any) -> str:
    """The losses are those of single documents, and not those of dense attention."""
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(LENGTHS)}
    found, expected = sft_losses(directory, "sparse", **settings), sft_losses(directory, "sparse", **alone)
    assert_close(found, expected, 1e-4)
    assert_other(found[0], sft_losses(directory, "sdpa", **settings)[0])
    return f"losses {', '.join(f'{loss:.4f}' for loss in found)}, as of single documents"


@check("TRL SFT, padded", "trl")
def trl_sft(directory: Path) -> str:
    return check_sft(directory)


@check("TRL SFT, padding_free", "trl")
def trl_padding_free(directory: Path) -> str:
    return check_sft(directory, padding_free=True, max_length=None)


@check("TRL SFT, packing", "trl")
def trl_packing(directory: Path) -> str:
    return check_sft(directory, packing=True, max_length=sum(LENGTHS), per_device_train_batch_size=1)


@check("hf-sparse-attn run -m trl.scripts.sft", "trl")
def trl_command(directory: Path) -> str:
    losses = {name: trl_command_loss(directory, name) for name in ("sdpa", "sparse")}
    assert_other(losses["sparse"], losses["sdpa"])
    return f"loss {losses['sparse']:.4f}, dense {losses['sdpa']:.4f}"


def trl_command_loss(directory: Path, attn_implementation: str) -> float:
    """The loss of the last step that TRL's own program made."""
    (data := directory / "data").mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    options = {
        "--model_name_or_path": directory,
        "--attn_implementation": attn_implementation,
        "--dtype": "float32",
        "--dataset_name": data,
        "--output_dir": directory / attn_implementation,
        "--max_steps": STEPS,
        "--logging_steps": 1,
        "--save_steps": STEPS,
        "--use_cpu": True,
        "--bf16": False,
        "--report_to": "none",
    }
    run("-m", "hf_sparse_attn", "run", "-m", "trl.scripts.sft", options=options)
    state = json.loads(next((directory / attn_implementation).rglob("trainer_state.json")).read_text())
    return state["log_history"][-1]["loss"]


def dpo_losses(directory: Path, batch_size: int, attn_implementation: str = "sparse") -> tuple[list[float], list[str]]:
    """The losses of TRL's DPOTrainer over the same four pairs in every step, and what its two models read."""
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": text[:50], "chosen": text[50:], "rejected": text[:10:-1]} for text in texts()]
    arguments = training_arguments(
        directory,
        model_init_kwargs={"attn_implementation": attn_implementation, "dtype": "float32"},
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(pairs) // batch_size,
        learning_rate=0.05,
    )
    losses, told = Losses(), []
    trainer = DPOTrainer(
        str(directory),
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(pairs),
        processing_class=byte_tokenizer(),
        callbacks=[losses],
    )
    policy, reference = (sparse_forwards(x, told, attn_implementation) for x in (trainer.model, trainer.ref_model))
    with policy, reference:
        trainer.train()
    return losses.found, told


@check("TRL DPO", "trl")
def trl_dpo(directory: Path) -> str:
    (found, told), (expected, _) = dpo_losses(directory, 4), dpo_losses(directory, 1)
    assert_close(found, expected, 1e-4)
    assert_other(found[1], dpo_losses(directory, 4, "sdpa")[0][1])
    reference, policy = told
    return f"losses {found[0]:.4f}, {found[1]:.4f}, as of single pairs; {policy}, of the reference model {reference}"


@check("peft LoRA", "peft")
def peft_lora(directory: Path) -> str:
    import peft

    told: list[str] = []
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load(directory), config).double().eval()
    with sparse_forwards(adapted, told):
        found = logits(adapted)
    adapted(input_ids=tokens(120)[None], labels=tokens(120)[None]).loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in adapted.parameters() if weight.requires_grad)
    adapted.save_pretrained(directory / "adapter")
    again = peft.PeftModel.from_pretrained(load(directory), str(directory / "adapter")).double().eval()
    assert_close(logits(again), found)
    assert_close(logits(adapted.merge_and_unload()), found)
    assert_other(found, logits(load(directory)))
    return f"{told[0]}; saved, loaded and merged it gives the same"


@check("lm-evaluation-harness", "lm_eval")
def lm_eval_model(directory: Path) -> str:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    told: list[str] = []
    given, asked = " what the text says" * 5, " and how it goes on"
    request = Instance("loglikelihood", {}, (given, asked), 0)
    dense, sparse = (
        HFLM(str(directory), attn_implementation=name, dtype="float64", device="cpu", batch_size=1, add_bos_token=False)
        for name in ("sdpa", "sparse")
    )
    with sparse_forwards(sparse.model, told):
        ((found, _),) = sparse.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor(byte_tokenizer()(given + asked)["input_ids"])
    expected = logits(load(directory), input_ids=ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
    assert_close(found, expected[-len(asked) :].sum().item(), 1e-6)
    assert_other(found, dense.loglikelihood([request], disable_tqdm=True)[0][0])
    return told[0]


@check("hf-sparse-attn run -m lm_eval", "lm_eval")
def lm_eval_command(directory: Path) -> str:
    margins = {name: lm_eval_margin(directory, name) for name in ("sdpa", "sparse")}
    assert_other(margins["sparse"], margins["sdpa"])
    return f"margin {margins['sparse']:.3f}, dense {margins['sdpa']:.3f}"


def lm_eval_margin(directory: Path, attn_implementation: str) -> float:
    """What the command gives for one sample of one of this package's tasks."""
    output = directory / f"lm_eval-{attn_implementation}"
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={directory},attn_implementation={attn_implementation},max_length=700",
        "--include_path": LM_EVAL_PATH,
        "--tasks": "hfsa_niah_single",
        "--metadata": json.dumps({"context_length": 600, "num_samples": 1, "dataset": str(text_file(directory))}),
        "--device": "cpu",
        "--output_path": output,
    }
    run("-m", "hf_sparse_attn", "run", "-m", "lm_eval", options=options)
    (file,) = output.rglob("results_*.json")
    return json.loads(file.read_text())["results"]["hfsa_niah_single"]["margin,none"]


def text_file(directory: Path) -> Path:
    file = directory / "text.txt"
    file.write_text(" ".join(f"the text says {number}" for number in range(400)))
    return file


def embeddings(directory: Path, attn_implementation: str, padding_side: str) -> tuple[Any, Any]:
    """Those of a batch, and of each of its texts alone, by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(directory),
        device="cpu",
        model_kwargs={"attn_implementation": attn_implementation, "dtype": torch.float64},
        processor_kwargs={"padding_side": padding_side},
    )
    told: list[str] = []
    with sparse_forwards(model, told, attn_implementation):
        together = model.encode(texts(), convert_to_tensor=True)
    return together, torch.stack([model.encode(text, convert_to_tensor=True) for text in texts()])


@check("sentence-transformers, padding on the right", "sentence-transformers")
def sentence_transformers(directory: Path) -> str:
    together, alone = embeddings(directory, "sparse", "right")
    assert_close(together, alone)
    assert_other(together, embeddings(directory, "sdpa", "right")[0])
    left, _ = embeddings(directory, "sparse", "left")
    difference = (left - alone).abs().max().item()
    return f"a batch gives what single texts do; padded on the left it differs by up to {difference:.1e}"


@check("torchao int8 weights", "torchao")
def torchao_int8(directory: Path) -> str:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    told: list[str] = []
    options = {"dtype": torch.float32, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    model, dense = load(directory, **options), load(directory, "sdpa", **options)
    with sparse_forwards(model, told):
        found = logits(model)
    hf_sparse_attn.configure(model, implementation="reference")
    assert_close(found, logits(model), 1e-4)
    assert_other(found, logits(dense))
    assert_other(found, logits(load(directory, dtype=torch.float32)))
    return f"{told[0]}; equal to the specification with the same weights"


@check("accelerate, layers offloaded to the disk", "accelerate")
def accelerate_offload(directory: Path) -> str:
    told: list[str] = []
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "disk"}
    model = load(directory, device_map=places, offload_folder=str(directory / "offloaded"))
    assert any(weight.is_meta for weight in model.parameters()), "nothing was offloaded"
    with sparse_forwards(model, told):
        found = logits(model)
    assert_close(found, logits(load(directory)))
    assert_other(found, logits(load(directory, "sdpa")))
    return told[0]


@check("LLaMA-Factory, by trust_remote_code", "llamafactory")
def llama_factory(directory: Path) -> str:
    one = {"per_device_train_batch_size": 1}
    alone = llama_factory_losses(directory, gradient_accumulation_steps=len(LENGTHS), **one)
    assert_close(llama_factory_losses(directory), alone, 1e-4)
    assert_close(llama_factory_losses(directory, neat_packing=True, **one), alone, 1e-4)
    assert_other(alone[0], llama_factory_losses(directory, flash_attn="sdpa")[0])
    return f"losses {', '.join(f'{loss:.4f}' for loss in alone)} of single documents, padded, and with neat_packing"


def llama_factory_losses(directory: Path, **settings: Any) -> list[float]:
    """Those of LLaMA-Factory's program, which knows no other attention by name: the checkpoint's own file says it."""
    from llamafactory.train.tuner import run_exp

    (data := directory / "data").mkdir(exist_ok=True)
    (data / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    written = [{"instruction": text[:20], "input": "", "output": text[20:]} for text in texts()]
    (data / "tiny.json").write_text(json.dumps(written))
    arguments = training_arguments(directory, per_device_train_batch_size=len(LENGTHS), report_to="none")
    del arguments["train_sampling_strategy"]
    run_exp(
        arguments
        | {"model_name_or_path": str(directory), "trust_remote_code": True, "stage": "sft", "finetuning_type": "full"}
        | {"do_train": True, "dataset": "tiny", "dataset_dir": str(data), "template": "default", "cutoff_len": 512}
        | {"overwrite_output_dir": True, "disable_shuffling": True, "preprocessing_num_workers": 1}
        | settings
    )
    log = json.loads((directory / "output" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@check("axolotl, its model loader, by trust_remote_code", "axolotl")
def axolotl(directory: Path) -> str:
    from axolotl.loaders import ModelLoader, load_tokenizer
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    told: list[str] = []
    written = {"base_model": str(directory), "trust_remote_code": True, "sequence_len": 256, "num_epochs": 1}
    written |= {"datasets": [{"path": "text.jsonl", "type": "completion"}], "micro_batch_size": 1}
    written |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-4, "optimizer": "sgd", "device_map": "cpu"}
    written |= {"bf16": False, "fp16": False, "float32": True}
    config = validate_config(DictDefault(written))
    normalize_config(config)
    model = ModelLoader(config, load_tokenizer(config)).load()[0].eval()
    with sparse_forwards(model, told):
        found = logits(model)
    assert_close(found, logits(load(directory, dtype=torch.float32)), 1e-5)
    try:
        validate_config(DictDefault(written | {"attn_implementation": "sparse"}))
    except ValueError:
        return f'{told[0]}; nothing was trained; its schema refuses the name "sparse"'
    return f"{told[0]}; nothing was trained"


TRAINED_BY_TWO = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import hf_sparse_attn

directory, output, attention, rows_at_once = sys.argv[1:]
torch.manual_seed(0)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(256, (4, 100))]
model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention)
arguments = TrainingArguments(
    output, max_steps=2, per_device_train_batch_size=int(rows_at_once), use_cpu=True, optim="sgd", learning_rate=0.01,
    max_grad_norm=0.0, logging_steps=1, report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
    lr_scheduler_type="constant", save_strategy="no",
)
trainer = Trainer(model, arguments, train_dataset=rows)
with hf_sparse_attn.record_density(model) as density:
    trainer.train()
if attention == "sparse":
    assert 0 < density.attended < density.admissible
if trainer.is_world_process_zero():
    print("processes", arguments.world_size)
    print("losses", *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
"""


def trained_by(directory: Path, num_processes: int, attention: str = "sparse") -> tuple[str, list[float]]:
    """The number of processes that a program saw which torchrun started, and its losses over the same four rows."""
    program = directory / "train.py"
    program.write_text(TRAINED_BY_TWO)
    output = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes),
        *("-m", "hf_sparse_attn", "run", program, directory, directory / "output", attention, 4 // num_processes),
    )
    told = dict(line.split(" ", 1) for line in output.splitlines() if line.startswith(("processes ", "losses ")))
    return told["processes"], [float(loss) for loss in told["losses"].split()]


@check("torchrun -m hf_sparse_attn run, two processes", "torch")
def torchrun(directory: Path) -> str:
    (processes, found), (_, expected) = trained_by(directory, 2), trained_by(directory, 1)
    assert processes == "2"
    assert_close(found, expected, 1e-4)
    assert_other(found[0], trained_by(directory, 2, "sdpa")[1][0])
    return f"losses {', '.join(f'{loss:.4f}' for loss in found)}, as in one process"


def installed(package: str | None) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version("hf_sparse_attn" if package is None else package)
    except PackageNotFoundError:
        return hf_sparse_attn.__version__ if package is None else None


def result_of(each: Check) -> dict[str, Any]:
    """What became of a check, JSON-ready."""
    found = {"name": each.name, "package": each.package or "hf_sparse_attn", "version": installed(each.package)}
    if found["version"] is None:
        return found | {"result": "not installed", "detail": f"pip install {each.package}"}
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
            save_tiny_model(Path(directory) / "model")
            found |= {"result": "passed", "detail": each.run(Path(directory) / "model")}
    except Exception as error:
        traceback.print_exc()
        found |= {"result": "failed", "detail": f"{type(error).__name__}: {one_line(error)}"}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="run checks with one of these words in their names")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args()
    chosen = [each for each in CHECKS if not arguments.only or any(word in each.name for word in arguments.only)]
    if not chosen:
        parser.error(f"argument --only: no check has such a word; there are {'; '.join(each.name for each in CHECKS)}")
    results = [result_of(each) for each in chosen]
    columns = ("name", "version", "result", "detail")
    print_table("Integrations", columns, [[str(found[name] or "") for name in columns] for found in results])
    if arguments.output:
        write_json(arguments.output, {"checks": results, "environment": describe_environment(torch.device("cpu"))})
    sys.exit(any(found["result"] == "failed" for found in results))


if __name__ == "__main__":
    main()
