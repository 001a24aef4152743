import json
import os
import shutil
import signal
from itertools import chain

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

SCRIPT = "finetune.py"


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return {
        "--model": tiny_model_path,
        "--dataset": text_directory,
        "--context-length": 48,
        "--output": tmp_path / "tuned",
        "--max-steps": 4,
        "--use_cpu": "true",
        "--disable-tqdm": "true",
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def test_trains_saves_and_resumes(run_script, arguments, tmp_path):
    output = arguments["--output"]
    finished = run_script(SCRIPT, *flat(arguments | {"--eval-dataset": arguments["--dataset"], "--eval-rows": 3}))
    assert finished.status == 0, finished.stderr
    assert "loss, first to last" in finished.stdout
    assert "held-out rows" in finished.stdout
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4
    AutoModelForCausalLM.from_pretrained(output, attn_implementation="sparse")

    finished = run_script(SCRIPT, *flat(arguments | {"--max-steps": 6, "--resume_from_checkpoint": "last"}))
    assert finished.status == 0, finished.stderr
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 6


def test_lora_ends_in_a_merged_model_and_goes_on(run_script, assert_refused, arguments):
    pytest.importorskip("peft")
    output, lora = arguments["--output"], {"--lora-rank": 4, "--learning-rate": "1e-2"}
    finished = run_script(SCRIPT, *flat(arguments | lora))
    assert finished.status == 0, finished.stderr
    merged = AutoModelForCausalLM.from_pretrained(output, attn_implementation="sparse").state_dict()
    before = AutoModelForCausalLM.from_pretrained(arguments["--model"]).state_dict()
    assert all(not merged[name].equal(before[name]) for name in before if name != "lm_head.weight")
    assert (output / "adapter" / "adapter_model.safetensors").is_file()

    resumed = arguments | {"--max-steps": 6, "--resume_from_checkpoint": "last"}
    refused = ["--resume_from_checkpoint", "is of a training with lora_rank 4, not None"]
    assert_refused(run_script(SCRIPT, *flat(resumed)), *refused)
    finished = run_script(SCRIPT, *flat(resumed | lora))
    assert finished.status == 0, finished.stderr
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 6


def test_memory_is_told_before_the_model_is_loaded(run_script, arguments, monkeypatch):
    def load_model(*args, **kwargs):
        raise MemoryError("loading")

    monkeypatch.setattr("hf_sparse_attn.cli.finetune.load_model", load_model)
    monkeypatch.setattr("hf_sparse_attn.training.memory_estimate.available_memory", lambda device: 10**8)
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 1
    assert finished.stdout.startswith("estimated peak memory: 1.1 GB (logits 0.3, libraries 0.8; ")
    assert finished.stdout.endswith("; 0.1 GB are free\n")
    warning, error = finished.stderr.splitlines()
    assert "warning: the estimate is more than the memory that is free on cpu: try, in this order, --grad" in warning
    assert error.endswith("there is too little memory: loading")
    taught = {"--distill": "true", "--sparse-attention": '{"dense_below": 8}'}
    finished = run_script(SCRIPT, *flat(arguments | taught))
    assert "distillation 0.2" in finished.stdout


@pytest.fixture
def half_written(run_script, arguments):
    """An output directory whose newest checkpoint, the third, lost the end of its weights."""
    finished = run_script(SCRIPT, *flat(arguments | {"--save-steps": 1, "--save-total-limit": 5, "--max-steps": 3}))
    assert finished.status == 0, finished.stderr
    weights = arguments["--output"] / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return arguments["--output"]


def test_last_checkpoint_is_the_last_whole_one(run_script, arguments, half_written):
    finished = run_script(SCRIPT, *flat(arguments | {"--resume_from_checkpoint": "last"}))
    assert finished.status == 0, finished.stderr
    warning = f"finetune.py: warning: {half_written / 'checkpoint-3'} was skipped: its model.safetensors is damaged"
    assert warning in finished.stderr.splitlines()
    assert json.loads((half_written / "trainer_state.json").read_text())["global_step"] == 4

    for folder in half_written.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    finished = run_script(SCRIPT, *flat(arguments | {"--resume_from_checkpoint": "last"}))
    assert finished.status == 2
    assert "argument --resume_from_checkpoint: no checkpoint 'last'" in finished.stderr
    assert "checkpoint-4: it has no trainer_state.json; checkpoint-3: " in finished.stderr


def test_damaged_checkpoint_that_was_asked_for_is_refused(run_script, assert_refused, arguments, half_written):
    given = {"--resume_from_checkpoint": half_written / "checkpoint-3"}
    words = ("--resume_from_checkpoint", str(half_written / "checkpoint-3"), "model.safetensors is damaged")
    assert_refused(run_script(SCRIPT, *flat(arguments | given)), *words)


def test_checkpoint_of_another_shape_is_refused(
    run_script, assert_refused, arguments, half_written, tmp_path, tiny_llama_config, tiny_model_path
):
    larger = tmp_path / "larger"
    shutil.copytree(tiny_model_path, larger)
    config = type(tiny_llama_config)(**tiny_llama_config.to_dict() | {"num_hidden_layers": 3})
    LlamaForCausalLM(config).save_pretrained(larger)
    given = {"--model": larger, "--resume_from_checkpoint": half_written / "checkpoint-2"}
    finished = run_script(SCRIPT, *flat(arguments | given))
    assert_refused(finished, "--resume_from_checkpoint", "checkpoint-2' is of another model: its num_hidden_layers")


def test_output_is_checked_where_a_checkpoint_lies_elsewhere(
    run_script, assert_refused, arguments, half_written, tmp_path
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    given = {"--output": tmp_path / "other", "--resume_from_checkpoint": half_written / "checkpoint-2"}
    assert_refused(run_script(SCRIPT, *flat(arguments | given)), "--output", "already holds something")


def test_without_a_logged_loss(run_script, arguments):
    changes = {"--logging-strategy": "no", "--logging-first-step": "false"}
    finished = run_script(SCRIPT, *flat(arguments | changes))
    assert finished.status == 0, finished.stderr
    assert "not logged -> not logged" in finished.stdout
    AutoModelForCausalLM.from_pretrained(arguments["--output"])


def test_loss_that_is_not_finite_is_one_line(run_script, arguments, monkeypatch):
    from transformers import Trainer

    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args: step(*args) * float("nan"))
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 1
    assert "finetune.py: error: the loss of step 1 is nan; try a smaller learning_rate; there is no checkpoint" in (
        finished.stderr.splitlines()
    )


@pytest.mark.usefixtures("interruptible")
def test_interrupted_training_leaves_a_checkpoint(run_script, arguments, monkeypatch):
    from transformers import Trainer

    step = Trainer.training_step

    def interrupting(trainer, *args):
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *args)

    monkeypatch.setattr(Trainer, "training_step", interrupting)
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 130
    assert "checkpoint-2' holds what was trained; --resume_from_checkpoint last goes on" in finished.stderr
    monkeypatch.undo()
    finished = run_script(SCRIPT, *flat(arguments | {"--resume_from_checkpoint": "last"}))
    assert finished.status == 0, finished.stderr


def test_output_that_is_a_dangling_link(run_script, arguments, tmp_path):
    arguments["--output"].symlink_to(tmp_path / "absent")
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 0, finished.stderr
    AutoModelForCausalLM.from_pretrained(arguments["--output"])


def test_output_that_holds_something_is_refused(run_script, assert_refused, arguments):
    arguments["--output"].mkdir()
    (arguments["--output"] / "notes.txt").write_text("mine")
    assert_refused(run_script(SCRIPT, *flat(arguments)), "--output", "already holds something")
    assert [path.name for path in arguments["--output"].iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "./missing"}, ["--model", "no such directory"]),
        ({"--dataset": "missing.txt"}, ["--dataset", "missing.txt"]),
        ({"--context-length": 100_000}, ["--dataset", "fewer than one row of 100000"]),
        ({"--context-length": 1}, ["--context-length", "must be at least 2"]),
        ({"--streaming": "true", "--context-length": 100_000}, ["--dataset", "too few tokens for a row of 100000"]),
        ({"--streaming": "true", "--max-steps": -1}, ["--streaming", "needs --max-steps"]),
        ({"--streaming": "true", "--dataset": "missing.txt"}, ["--dataset", "missing.txt"]),
        ({"--streaming": "true", "--eval-dataset": "missing.txt"}, ["--eval-dataset", "missing.txt"]),
        ({"--dataset": "demo:nan"}, ["--dataset", "'demo'", "finite number greater than 0, got 'nan'"]),
        ({"--dataset": "govreport=missing"}, ["--dataset", "govreport=missing", "no such file or directory"]),
        ({"--rows": "loose"}, ["--rows", "loose"]),
        ({"--eval-dataset": "missing.txt"}, ["--eval-dataset", "missing.txt"]),
        ({"--eval-rows": 0}, ["--eval-rows"]),
        ({"--sparse-attention": '{"windw_size": 4}'}, ["--sparse-attention", "windw_size"]),
        ({"--dtype": "float33"}, ["--dtype", "'float33'"]),
        ({"--max-steps": "many"}, ["--max-steps", "many"]),
        ({"--warmup-steps": -1}, ["warmup_steps"]),
        ({"--resume_from_checkpoint": "last"}, ["--resume_from_checkpoint", "no checkpoint"]),
        ({"--resume_from_checkpoint": "nowhere"}, ["--resume_from_checkpoint", "no checkpoint 'nowhere'"]),
        ({"--no-such-option": 1}, ["--no-such-option"]),
        ({"--sparse-attention": "{"}, ["--sparse-attention", "not valid JSON"]),
        ({"--sparse-attention": ""}, ["--sparse-attention", "''"]),
        ({"--dtype": "float8_e5m2"}, ["--dtype", "'float8_e5m2'"]),
        ({"--learning-rate": "nan"}, ["--learning_rate", "'nan'"]),
        ({"--learning-rate": "1e400"}, ["learning_rate", "inf"]),
        ({"--learning-rate": -1}, ["learning_rate", "-1"]),
        ({"--max-steps": 0}, ["max_steps", "got 0"]),
        ({"--max-steps": 10**30}, ["--max_steps", "at most"]),
        ({"--num-train-epochs": -1}, ["num_train_epochs", "-1"]),
        ({"--per-device-train-batch-size": 0}, ["per_device_train_batch_size", "got 0"]),
        ({"--gradient-accumulation-steps": 0}, ["gradient_accumulation_steps", "got 0"]),
        ({"--adam-beta1": 2}, ["adam_beta1", "got 2"]),
        ({"--optim": "adamw_8bit"}, ["--optim adamw_8bit", "bitsandbytes"]),
        ({"--lora-rank": 0}, ["lora_rank must be", "got 0"]),
        ({"--lora-alpha": 8}, ["lora_alpha is of use with lora_rank alone, got 8"]),
        ({"--offload-activations": "true"}, ["offload_activations needs gradient_checkpointing"]),
        ({"--report-to": "nobody"}, ["TrainingArguments", "nobody"]),
        ({"--accelerator-config": "nowhere.json"}, ["nowhere.json"]),
    ],
    ids=lambda value: " ".join(map(str, chain(*value.items()))) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, changes, words):
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert not arguments["--output"].exists()


@pytest.fixture
def no_model(monkeypatch):
    def load_model(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hf_sparse_attn.cli.finetune.load_model", load_model)


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (3, {}, "--parallelism-config: sp_size=3 does not divide the 2 KV heads of layer 0"),
        (2, {"--context-length": 47}, "--parallelism-config: sp_size=2 does not divide the 47 tokens of a row"),
        (2, {"--distill": "true"}, "--distill: rows must not be divided among processes (Ulysses)"),
    ],
    ids=["KV heads", "tokens", "distill"],
)
def test_parts_of_rows_that_cannot_be(
    run_script, assert_refused, arguments, no_model, monkeypatch, size, changes, words
):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # as `accelerate launch` tells it
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", str(size))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), words)


def test_hub_that_nobody_knows_the_user_of(run_script, assert_refused, arguments, no_model):
    options = arguments | {"--push-to-hub": "true", "--hub-token": "hf_none"}
    assert_refused(run_script(SCRIPT, *flat(options)), "--push-to-hub: the Hub does not tell who you are: ")


def test_datasets_are_read_before_anything_is_tokenised(run_script, assert_refused, arguments, monkeypatch):
    def tokenize(*args, **kwargs):
        raise AssertionError("tokenised")

    monkeypatch.setattr("hf_sparse_attn.cli.training_rows.tokenize", tokenize)
    assert_refused(run_script(SCRIPT, *flat(arguments | {"--eval-dataset": "missing.txt"})), "--eval-dataset")


@pytest.mark.parametrize(
    ("specs", "options", "words"),
    [
        (["demo:0.5", "{}"], [], ["--dataset", "either every dataset has a share", "has none"]),
        (["demo", "{}"], ["--streaming"], ["--streaming", "need shares (DATASET:SHARE)"]),
        (["{}:1", "{}:2"], [], ["--dataset", "given more than once"]),
        (["demo:1", "{}/short.txt:1"], [], ["--dataset", "short.txt: dataset has 5 tokens in all, fewer than one row"]),
        (["{}/short.txt:1", "demo:1"], ["--streaming"], ["--dataset", "short.txt", "too few tokens for a row of 48"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_mixtures_are_refused(run_script, assert_refused, arguments, specs, options, words):
    directory = arguments.pop("--dataset")
    specs = [spec.format(directory) for spec in specs]
    assert_refused(run_script(SCRIPT, "--dataset", *specs, *options, *flat(arguments)), *words)


@pytest.fixture
def read_rows(monkeypatch):
    """The input_ids of the steps, as they are trained on."""
    from transformers import Trainer

    step, rows = Trainer.training_step, []

    def recording(trainer, model, inputs, *args, **kwargs):
        rows.extend(inputs["input_ids"].tolist())
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", recording)
    return rows


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize("kind", ["best-fit", "packed"])
def test_resumed_mixture_goes_on_with_the_rows_that_follow(run_script, arguments, read_rows, tmp_path, streaming, kind):
    (tmp_path / "x.txt").write_text("x" * 99)
    specs = ["--dataset", f"{arguments.pop('--dataset')}:0.5", f"{tmp_path / 'x.txt'}:0.5"]
    options = flat(arguments | {"--streaming": streaming, "--rows": kind, "--save-strategy": "no"})
    finished = run_script(SCRIPT, *specs, *options, "--max-steps", 7, "--output", tmp_path / "whole")
    assert finished.status == 0, finished.stderr
    whole = read_rows.copy()
    of_x = [len(set(row)) <= 2 for row in whole]
    assert of_x.count(True) in (3, 4)
    assert ("times for its share" if streaming == "false" else "begins again") in finished.stderr

    read_rows.clear()
    options = flat(arguments | {"--streaming": streaming, "--rows": kind})
    for steps, more in ((3, []), (7, ["--resume_from_checkpoint", "last"])):
        finished = run_script(SCRIPT, *specs, *options, "--max-steps", steps, *more)
        assert finished.status == 0, finished.stderr
    assert read_rows == whole


def test_lines_tell_how_many_tokens_there_are(run_script, arguments, tmp_path):
    (tmp_path / "x.txt").write_text("x" * 97)
    finished = run_script(SCRIPT, *flat(arguments | {"--dataset": tmp_path / "x.txt", "--save-strategy": "no"}))
    assert finished.status == 0, finished.stderr
    assert (
        f"{tmp_path / 'x.txt'}: 1 documents of 97 tokens, 2 best-fit rows of 48, 0.00% of them padding, "
        "1.03% of the tokens in no row"
    ) in finished.stdout.splitlines()
    assert "warning: the tokenizer has no EOS token: documents end without one" in finished.stderr
    arguments["--output"] = tmp_path / "other"
    changes = {"--dataset": tmp_path / "x.txt", "--rows": "packed", "--save-strategy": "no"}
    finished = run_script(SCRIPT, *flat(arguments | changes), "--no-eos")
    assert "97 tokens, 2 packed rows of 48, 1.03% of the tokens in no row" in finished.stdout
    assert "EOS" not in finished.stderr


def test_missing_output_is_refused(run_script, assert_refused, arguments):
    del arguments["--output"]
    assert_refused(run_script(SCRIPT, *flat(arguments)), "--output")


@pytest.mark.real_weights
def test_real_model_learns(run_script, tmp_path):
    finished = run_script(
        SCRIPT, "--model", "demo", "--dataset", "demo", "--context-length", 256, "--output", tmp_path / "tuned",
        "--max-steps", 6, "--eval-dataset", "demo", "--eval-rows", 4, "--save-strategy", "no",
        "--learning-rate", "1e-4", "--sparse-attention", '{"window_size": 64, "dense_below": 0, "key_budget": 32}',
    )  # fmt: skip
    assert finished.status == 0, finished.stderr
    results = json.loads((tmp_path / "tuned" / "all_results.json").read_text())
    assert results["eval_loss_after"] < results["eval_loss_before"]
