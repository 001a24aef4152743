"""What training frameworks do with a sparse model: Trainer, PEFT's soft prompts, DDP, FSDP2 and tensor parallelism."""

import pytest
import torch
import torch.nn.functional as F
from helpers import distributed_worker, families
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.operation import calibrated_hash_text
from helpers.specification import TOLERANCE
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # PEFT, about generate's own
]
FEATURES = {
    "random hash": {},
    "a budget per head": {"key_budget": [[5, 3], [4, 0]], "min_weight": [[0.0, 0.05, 0.1, 0.02], 0.03]},
    "calibrated hash": {"hash": "calibrated", "calibrated_hash": calibrated_hash_text()},
}


def right_padded(rows):
    """A batch as tokenizers and data collators pad it, without position_ids."""
    ids, labels = (pad_sequence([row[name] for row in rows], True, 0) for name in ("input_ids", "labels"))
    mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


class TestTrainer:
    """Steps of Trainer's own loop are steps of gradient descent on the documents, each run alone."""

    LENGTHS = (40, 23, 31, 36, 28, 44, 37, 25, 41, 33, 22, 38)
    LEARNING_RATE = 0.1

    def documents(self):
        rows = [tokens(length, seed=length)[0] for length in self.LENGTHS]
        return [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in rows]

    def trained_by_hand(self, documents_per_step):
        model, losses = tiny_model(), []
        for step in range(0, len(self.LENGTHS), documents_per_step):
            rows = [row["input_ids"] for row in self.documents()[step : step + documents_per_step]]
            total = sum(
                F.cross_entropy(model(row[None], use_cache=False).logits[0, :-1], row[1:], reduction="sum")
                for row in rows
            )
            losses.append(total / sum(len(row) - 1 for row in rows))
            model.zero_grad()
            losses[-1].backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= self.LEARNING_RATE * parameter.grad
        return model, losses

    @pytest.mark.parametrize(
        "collator",
        [
            right_padded,
            DataCollatorWithFlattening(),
            DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        ],
        ids=["right-padded", "flattened", "flattened, with the keyword arguments of flash attention"],
    )
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"gradient_accumulation_steps": 2},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ],
        ids=["plain", "accumulation", "checkpointing", "reentrant checkpointing"],
    )
    def test_each_document_alone(self, collator, arguments, tmp_path):
        model = tiny_model()
        training_arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=self.LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        )
        trainer = Trainer(model, training_arguments, collator, self.documents())
        trainer.train()
        expected, expected_losses = self.trained_by_hand(2 * training_arguments.gradient_accumulation_steps)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses == pytest.approx([loss.item() for loss in expected_losses], rel=1e-5)
        initial = dict(tiny_model().named_parameters())
        for name, parameter in expected.named_parameters():
            assert (parameter - initial[name]).abs().amax() > 1e-3, name
        # The models' own loss is computed in float32.
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-5)


class TestSoftPrompts:
    """Virtual tokens that PEFT puts before the text: cached keys (prefix tuning) or embeddings (prompt tuning).

    They are the first positions of the document. PEFT's own position_ids start after them.
    """

    NUM_VIRTUAL = 4
    LENGTHS = (38, 25, 1)
    families = pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
    sides = pytest.mark.parametrize("side", ["left", "right"])
    methods = pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"], ids=["prefix", "prompt"])

    def tuned(self, method="PrefixTuningConfig", family="llama", implementation="sparse", **fields):
        peft = pytest.importorskip("peft")
        config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=self.NUM_VIRTUAL)
        model = tiny_model(family, implementation, **fields)
        torch.manual_seed(1)
        return peft.get_peft_model(model, config).double().eval()

    def text_logits(self, model, ids, **inputs):
        """Logits of the text's own tokens; prompt tuning gives those of the virtual tokens too."""
        return model(input_ids=ids, use_cache=False, **inputs).logits[:, -ids.shape[1] :]

    def rows(self):
        return [tokens(length, seed=length)[0] for length in self.LENGTHS]

    def outcome(self, model, side):
        """Logits of a padded batch's tokens, and the gradient of the virtual tokens."""
        ids, mask, _ = padded_batch(self.rows(), side, 3)
        found = self.text_logits(model, ids, attention_mask=mask)[mask.bool()]
        found.log_softmax(-1)[:, 7].sum().backward()
        trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(gradient.abs().amax() > 1e-3 for gradient in trained.values())
        return found.detach(), trained

    @families
    @sides
    @methods
    def test_reference(self, method, family, side):
        model, oracle = (self.tuned(method, family) for _ in range(2))
        oracle.get_base_model().config.sparse_attention["implementation"] = "reference"
        torch.testing.assert_close(self.outcome(model, side), self.outcome(oracle, side), **TOLERANCE)

    @pytest.mark.parametrize(
        ("family", "side"),
        [("llama", "left"), ("llama", "right"), ("mistral-sliding", "right")],
        ids=["llama-left", "llama-right", "mistral-sliding-right"],
    )
    @methods
    def test_full_coverage_is_sdpa(self, method, family, side):
        """Not so for a model's own window with padding behind the prefix, which SDPA's mask counts as tokens."""
        model, dense = self.tuned(method, family, window_size=80), self.tuned(method, family, "sdpa")
        torch.testing.assert_close(self.outcome(model, side), self.outcome(dense, side), **TOLERANCE)

    @families
    @sides
    def test_each_row_alone_after_its_prefix(self, family, side):
        """Under position_ids as `generate` makes them, and under those of the columns, which do not show padding."""
        model = self.tuned(family=family)
        ids, mask, positions = padded_batch(self.rows(), side, 3)
        for position_ids in (positions, torch.arange(ids.shape[1]).expand_as(ids)):
            together = self.text_logits(model, ids, attention_mask=mask, position_ids=position_ids)
            for i, row in enumerate(self.rows()):
                columns = mask[i].bool()
                alone = self.text_logits(model, row[None], position_ids=position_ids[i, columns][None])[0]
                torch.testing.assert_close(together[i, columns], alone, **TOLERANCE)

    def test_prefix_is_the_start_of_the_document(self):
        """Rows that read their own key and two globals: the globals are the first two of the prefix."""
        model = self.tuned(window_size=1, num_global_tokens=2, key_budget=0)
        ids = tokens(30)
        before = self.text_logits(model, ids)
        for virtual, read in enumerate([True, True, False, False]):
            changed = self.tuned(window_size=1, num_global_tokens=2, key_budget=0)
            changed.prompt_encoder["default"].embedding.weight.data[virtual] += 1
            difference = (self.text_logits(changed, ids) - before).abs().amax(-1)
            assert (difference > 1e-3).all() if read else not difference.any()

    @families
    @pytest.mark.parametrize(
        ("method", "lengths"),
        [("PrefixTuningConfig", (38, 25)), ("PromptTuningConfig", (30, 30))],
        ids=["prefix", "prompt"],
    )
    def test_generate(self, method, lengths, family):
        """Left-padded with a cache against each row alone without one (prompt tuning counts padding as positions)."""
        model = self.tuned(method, family)
        rows = [tokens(length, seed=i)[0] for i, length in enumerate(lengths)]
        ids, mask, _ = padded_batch(rows, "left", 0)
        generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        for row, text in zip(rows, generated, strict=True):
            for _ in range(8):
                with torch.no_grad():
                    row = torch.cat([row, self.text_logits(model, row[None])[0, -1:].argmax(-1)])
            assert torch.equal(text[-8:], row[-8:])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    processes = distributed_worker.TwoProcesses(tmp_path_factory)
    yield processes
    processes.stop()


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
class TestDataParallel:
    def test_ddp(self, fields, two_processes):
        two_processes.run(distributed_worker.check_ddp, fields)

    def test_fsdp(self, fields, two_processes):
        two_processes.run(distributed_worker.check_fsdp, fields)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_loss_in_chunks(sharded, two_processes):
    two_processes.run(distributed_worker.check_loss_in_chunks, sharded)


GATHERED = {"o_proj": "rowwise_split_input", **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output")}


loaded_in_parallel = pytest.mark.skipif(
    "tp_size" not in DistributedConfig.__dataclass_fields__, reason="older Transformers take other arguments"
)


class TestTensorParallel:
    """Heads split over two processes: each uses its own part of the hash and of the budgets."""

    def saved(self, directory, **fields):
        tiny_model(**fields).save_pretrained(directory)
        return directory

    @loaded_in_parallel
    @pytest.mark.parametrize("plan", [None, GATHERED], ids=["split", "gathered"])
    def test_transformers(self, plan, two_processes, tmp_path):
        paths = [self.saved(tmp_path / name, **fields) for name, fields in FEATURES.items()]
        two_processes.run(distributed_worker.check_transformers_tensor_parallel, paths, plan)

    def test_torch(self, two_processes):
        two_processes.run(distributed_worker.check_torch_tensor_parallel, list(FEATURES.values()))

    @loaded_in_parallel
    @pytest.mark.parametrize(
        ("num_kv_heads", "plan", "message"),
        [
            (1, None, 'attn_implementation="sparse".*num_key_value_heads'),
            (2, {"k_proj": "replicate", "v_proj": "replicate"}, 'attn_implementation="sparse".*2 KV heads'),
            (1, {"k_proj": "replicate", "v_proj": "replicate"}, 'attn_implementation="sparse".*1 KV heads'),
        ],
        ids=["half a KV head for each process", "query heads split, KV heads not", "one KV head in every process"],
    )
    def test_refused(self, num_kv_heads, plan, message, two_processes, tmp_path, monkeypatch):
        monkeypatch.setattr(families, "NUM_KV_HEADS", num_kv_heads)
        path = self.saved(tmp_path / "model")
        two_processes.run(distributed_worker.check_refused_split, path, plan, message)
