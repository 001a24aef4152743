"""What it would cost and save to find candidates once for several layers: a study, not a feature.

    python scripts/measure_shared_candidates.py --model results/model --output benchmarks/shared_candidates.json

For each sparse layer and KV head: the predicted loss (as conversion predicts it) when its rows read their keys out of
the candidates of another KV head, of the same layer or up to four layers before. Then which heads should take
another's candidates as more and more do, what the real model loses, what time routing takes, and what the same
predicted loss buys by smaller budgets instead. The model must be a converted one; runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_sparse_attn.calibration import calibrate
from hf_sparse_attn.calibration.budget_allocation import (
    Allocation,
    Costs,
    allocate,
    by_head,
    sampled_blocks,
    sensitivity_root,
)
from hf_sparse_attn.config import SparseAttentionConfig, text_config
from hf_sparse_attn.data import load_documents, long_documents
from hf_sparse_attn.environment import describe_environment, written_fields
from hf_sparse_attn.evaluation.perplexity import token_nll
from hf_sparse_attn.integration import configured, observe
from hf_sparse_attn.loading import load_model, read_checkpoint
from hf_sparse_attn.ops import document_attention, find_keys
from hf_sparse_attn.ops import torch as torch_backend
from hf_sparse_attn.output_files import write_json
from hf_sparse_attn.patterns import LayerPattern, layer_pattern, static_positions
from hf_sparse_attn.routing import BucketIndex, RowChunk

Head = tuple[int, int]  # a layer and a KV head of it
Pairs = dict[tuple[Head, Head], dict[str, float]]  # who takes candidates, and whose

MAX_DISTANCE = 4  # layers between a source and who takes its candidates
NUM_TOP = 64
FIELDS = ("key_budget", "min_weight", "dense_layers")  # what conversion chooses
WORK = ["prediction", "model", "times"]
COMPARED_SHARES = (0.25, 0.5, 0.75)  # measured on the real model, and held against smaller budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A converted model.")
    parser.add_argument("--context-length", type=int, metavar="N", default=8192, help="(default: %(default)s)")
    parser.add_argument("--max-documents", type=int, metavar="N", default=2, help="(default: %(default)s)")
    parser.add_argument("--calibration-documents", type=int, metavar="N", default=3, help="(default: %(default)s)")
    parser.add_argument("--timed-lengths", type=int, nargs="*", metavar="N", default=[8192, 32768])
    parser.add_argument("--repeats", type=int, metavar="N", default=2, help="Of what is timed (default: %(default)s).")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK, help="Measure these (default: all).")
    parser.add_argument("--output", metavar="FILE", help="JSON with everything; what it holds of other work stays.")
    arguments = parser.parse_args()
    path, _, tokenizer, fields = read_checkpoint(arguments.model)
    model = load_model(arguments.model, path, device=torch.device("cpu"), num_tokens=arguments.context_length)
    config = SparseAttentionConfig.from_dict(fields)

    def read(split: str, number: int) -> list[dict[str, Any]]:
        return long_documents(load_documents("demo", split), tokenizer, arguments.context_length, max_documents=number)

    documents = read("validation", arguments.max_documents)
    calibration = read("train", arguments.calibration_documents)
    result: dict[str, Any] = {}
    if arguments.output and Path(arguments.output).exists():
        result = json.loads(Path(arguments.output).read_text())
    result |= {
        "source": {"model": arguments.model, "context_length": arguments.context_length},
        "documents": [document["name"] for document in documents],
        "sparse_attention": written_fields(config.to_dict()),
        "environment": describe_environment(torch.device("cpu")),
    }

    def tell(name: str, value: Any) -> None:
        result[name] = value
        print(f"{name}: {json.dumps(value)[:2000]}", flush=True)
        if arguments.output:
            write_json(arguments.output, result)

    if arguments.work != ["times"]:
        studies = study(model, config, documents, calibration)
        plans = choose(total(studies))
        compared = [plans[round(share * len(studies[0].own))] for share in COMPARED_SHARES]
    if "prediction" in arguments.work:
        tell("prediction", summary(studies))
        tell("curve", curve(studies))
        tell("smaller_budgets", smaller_budgets(studies, config, result["curve"]))
    if "model" in arguments.work:
        tell("model", measured(model, config, documents, studies, compared))
    if "times" in arguments.work:
        text = tokenizer("\n\n".join(load_documents("demo", "validation")["text"]), verbose=False)["input_ids"]
        choices = result.get("smaller_budgets", {}).get("choices", [])
        for length in arguments.timed_lengths:
            ids = torch.tensor([text[:length]])
            tell(f"seconds_{length}", times(model, config, ids, choices, arguments.repeats))


@dataclass
class Study:
    """What was measured on one document.

    Args:
        own: predicted loss of each KV head's query heads with their own candidates, in nats per token.
        pairs: by who takes and whose candidates are taken: "loss" as above, and overlaps.
        costs: of every choice of budgets, as conversion measures them.
    """

    own: dict[Head, float]
    pairs: Pairs
    costs: Costs

    def loss(self, plan: dict[Head, Head]) -> float:
        """Predicted loss, of what it is more than with own candidates everywhere."""
        return sum(self.pairs[taker, source]["loss"] - self.own[taker] for taker, source in plan.items())


@torch.no_grad()
def study(model: Any, config: SparseAttentionConfig, documents: list[Any], calibration: list[Any]) -> list[Study]:
    sensitivity: dict[int, Tensor] = {}
    for i, document in enumerate(calibration):
        tokens = torch.tensor(document["input_ids"][: calibrate.GRADIENT_TOKENS])
        for layer, moment in calibrate._gradient_moments(model, tokens, config.seed + i).items():
            sensitivity[layer] = sensitivity.get(layer, 0) + moment / len(calibration)
    samples = (calibrate._read(model, torch.tensor(document["input_ids"]), config)[0] for document in documents)
    num_layers = text_config(model.config).num_hidden_layers
    return [study_document(sample, sensitivity, config, num_layers) for sample in samples]


def study_document(
    sample: dict[int, Any], sensitivity: dict[int, Tensor], config: SparseAttentionConfig, num_layers: int
) -> Study:
    def pattern(config: SparseAttentionConfig, layer: int) -> LayerPattern:
        kept = sample[layer]
        shape = len(kept.rows), *kept.key.shape[::2]
        return layer_pattern(config, layer, *shape, torch.device("cpu"), torch.float32, kept.sliding_window)

    every_layer = config.replace(dense_layers=())
    hashes = {layer: pattern(every_layer, layer).bucket_hash for layer in sample}
    patterns = {layer: pattern(config, layer) for layer in sample if layer not in config.dense_layers}
    rows = {layer: SampledRows.of(sample[layer], patterns[layer], sensitivity[layer]) for layer in patterns}
    own: dict[Head, float] = {}
    pairs: Pairs = {}
    for of_layer in calibrate._by_layer(partial(measure_pairs, layers=rows), rows).values():
        own |= of_layer[0]
        pairs |= of_layer[1]
    return Study(own, pairs, calibrate._document_costs(sample, sensitivity, hashes, every_layer, num_layers))


@dataclass
class SampledRows:
    """The sampled rows of one layer on one document.

    Args:
        query: [num_heads, R, head_dim], scaled.
        key, value: [num_key_value_heads, N, head_dim].
        root: [num_heads, head_dim, head_dim], a root of the loss's second derivatives.
        visible, local: [R, N], keys that a row may read, and those that it reads in any case.
        found: [num_key_value_heads, R, at most 4096], candidates from the best on; N where there are no more.
        top: by name, [num_key_value_heads, R, NUM_TOP]: keys with the largest weights, as the mean over the group.
        scale: of sums over sampled rows, to nats per token.
    """

    pattern: LayerPattern
    query: Tensor
    key: Tensor
    value: Tensor
    root: Tensor
    visible: Tensor
    local: Tensor
    found: Tensor
    top: dict[str, Tensor]
    scale: float

    @classmethod
    def of(cls, sample: Any, pattern: LayerPattern, sensitivity: Tensor) -> SampledRows:
        config = pattern.config
        key, value, query = sample.key.float(), sample.value.float(), sample.rows.float() * sample.scaling
        num_kv_heads, num_tokens = key.shape[:2]
        blocks = sampled_blocks(config, num_tokens)
        position = torch.cat([torch.arange(*block) for block in blocks])[:, None]
        column = torch.arange(num_tokens)
        visible = column <= position
        local = column > position - config.window_size
        static = static_positions(config, num_tokens, key.device, marked=pattern.marked)
        local[:, static] = True
        bucket = pattern.bucket_hash.assign(key)
        group = query.unflatten(0, (num_kv_heads, -1))
        found = torch.full((num_kv_heads, len(position), 4096), num_tokens)
        for kv_head in range(num_kv_heads):
            index = BucketIndex(key[kv_head], bucket[kv_head], static, blocks[0][0], 0, pattern)
            done = 0
            for start, stop in blocks:
                summed = group[kv_head, :, done : done + stop - start].sum(0)
                keys, count = index.rows(start, stop).select(summed, found.shape[-1])
                live = torch.arange(keys.shape[1]) < count[:, None]
                found[kv_head, done : done + stop - start, : keys.shape[1]] = keys.long().masked_fill(~live, num_tokens)
                done += stop - start
        scale = (num_tokens - config.dense_below) / len(position) / num_tokens
        root = sensitivity_root(sensitivity)
        rows = cls(pattern, query, key, value, root, visible, local & visible, found, {}, scale)
        means = torch.stack([rows.weights(kv_head).mean(0) for kv_head in range(num_kv_heads)])
        rows.top["all"] = means.topk(NUM_TOP).indices
        rows.top["routable"] = means.masked_fill(rows.local, 0).topk(NUM_TOP).indices
        return rows

    def heads(self, kv_head: int) -> slice:
        group = len(self.query) // len(self.key)
        return slice(kv_head * group, (kv_head + 1) * group)

    def weights(self, kv_head: int) -> Tensor:
        """[group, R, N], the dense attention's."""
        scores = self.query[self.heads(kv_head)] @ self.key[kv_head].T
        return scores.masked_fill(~self.visible, -torch.inf).softmax(-1)

    def candidates(self, kv_head: int, budget: int) -> Tensor:
        """[R, N], bool."""
        return self.members(self.found[kv_head, :, :budget])

    def members(self, keys: Tensor) -> Tensor:
        """Key indices [R, M] as a mask [R, N]."""
        num_rows, num_tokens = self.visible.shape
        return torch.zeros(num_rows, num_tokens + 1, dtype=torch.bool).scatter_(1, keys, True)[:, :num_tokens]

    def loss(self, kv_head: int, weights: Tensor, read: Tensor) -> float:
        """Predicted loss, in nats per token, of reading candidates with the weights `read` [group, R, N]."""
        value, fixed = self.value[kv_head], weights * self.local
        mass = fixed.sum(-1, keepdim=True) + read.sum(-1, keepdim=True)
        error = ((fixed + read) @ value) / mass - weights @ value
        return float((error @ self.root[self.heads(kv_head)]).double().square().sum()) / 2 * self.scale


def measure_pairs(layer: int, layers: dict[int, SampledRows]) -> tuple[dict[Head, float], Pairs]:
    """What the KV heads of a layer lose with their own candidates, and with those of each other source."""
    rows = layers[layer]
    own: dict[Head, float] = {}
    pairs: Pairs = {}
    sources = [(s, g) for s in range(layer - MAX_DISTANCE, layer + 1) if s in layers for g in range(len(layers[s].key))]
    for kv_head, budget in enumerate(rows.pattern.budgets):
        weights = rows.weights(kv_head)
        least = torch.tensor(rows.pattern.min_weights[rows.heads(kv_head)])[:, None, None]
        heavy = weights * (weights >= least)
        mine = rows.candidates(kv_head, budget)
        read = (heavy > 0) & mine
        own[layer, kv_head] = rows.loss(kv_head, weights, heavy * mine)
        for source in sources:
            if source == (layer, kv_head):
                continue
            other, g = layers[source[0]], source[1]
            theirs = other.candidates(g, budget)
            as_found = other.candidates(g, other.pattern.budgets[g])
            tops = {name: rows.members(top[kv_head]).gather(1, other.top[name][g]) for name, top in rows.top.items()}
            pairs[(layer, kv_head), source] = {
                "loss": rows.loss(kv_head, weights, heavy * theirs),
                "loss_own_budget": rows.loss(kv_head, weights, heavy * as_found),
                "candidates": float((mine & theirs).sum() / mine.sum()),
                "read": float((read & theirs).sum() / read.sum()),
                **{f"top_{name}": float(top.float().mean()) for name, top in tops.items()},
            }
    return own, pairs


def total(studies: list[Study]) -> Study:
    """The mean of the losses over documents."""
    first, n = studies[0], len(studies)
    own = {head: sum(one.own[head] for one in studies) / n for head in first.own}
    pairs = {
        pair: {name: sum(one.pairs[pair][name] for one in studies) / n for name in values}
        for pair, values in first.pairs.items()
    }
    costs = sum((one.costs for one in studies[1:]), first.costs)
    return Study(own, pairs, costs)


def summary(studies: list[Study]) -> dict[str, Any]:
    """Means over heads by distance: of all sources, and of each head's best one at that distance."""
    mean = total(studies)
    sources: list[dict[Head, list[dict[str, Any]]]] = [{} for _ in range(MAX_DISTANCE + 1)]
    for (taker, source), values in mean.pairs.items():
        described = values | {"added": values["loss"] - mean.own[taker]}
        sources[taker[0] - source[0]].setdefault(taker, []).append(described)

    def means(of_pairs: list[dict[str, Any]]) -> dict[str, float]:
        return {name: statistics.mean(values[name] for values in of_pairs) for name in of_pairs[0]}

    by_distance = []
    for distance, of_heads in enumerate(sources):
        best = [min(of_head, key=lambda values: values["loss"]) for of_head in of_heads.values()]
        every = means([values for of_head in of_heads.values() for values in of_head])
        median = statistics.median(values["added"] for values in best)
        row = {"distance": distance, "heads": len(best), "best": means(best), "median_added_of_best": median}
        by_distance.append(row | {"all": every})
    heads = [{"layer": layer, "kv_head": kv_head, "loss": loss} for (layer, kv_head), loss in mean.own.items()]
    return {"own_loss": sum(mean.own.values()), "by_distance": by_distance, "heads": heads}


def choose(mean: Study) -> dict[int, dict[Head, Head]]:
    """By number of heads that take another's candidates: whose each takes. Greedy, the smallest loss first.

    A source reads its own candidates. When a head that others take from starts to take itself, these move to the best
    source that is left.
    """
    added: dict[Head, dict[Head, float]] = {head: {} for head in mean.own}
    for (taker, source), values in mean.pairs.items():
        if source[0] < taker[0]:
            added[taker][source] = values["loss"] - mean.own[taker]
    plan: dict[Head, Head] = {}
    plans = {0: dict(plan)}
    while True:
        best: tuple[float, dict[Head, Head]] | None = None
        for head in mean.own.keys() - plan.keys():
            moving = [head, *(taker for taker, source in plan.items() if source == head)]
            kept = mean.own.keys() - plan.keys() - {head}
            if any(not added[taker].keys() & kept for taker in moving):
                continue
            moves = {taker: min(added[taker].keys() & kept, key=added[taker].__getitem__) for taker in moving}
            now = sum(added[taker][plan[taker]] for taker in moving if taker in plan)
            price = sum(added[taker][source] for taker, source in moves.items()) - now
            if best is None or price < best[0]:
                best = price, moves
        if best is None:
            return plans
        plan |= best[1]
        plans[len(plan)] = dict(plan)


def curve(studies: list[Study]) -> list[dict[str, Any]]:
    """Predicted loss by share of heads that take another's candidates: where it was chosen, and on other documents."""
    plans, of_each = choose(total(studies)), [choose(one) for one in studies]
    return [
        {
            "share": shared / len(studies[0].own),
            "added_loss": [one.loss(plan) for one in studies],
            "added_elsewhere": [
                other.loss(chosen[shared])
                for chosen, one in zip(of_each, studies, strict=True)
                for other in studies
                if other is not one
            ],
        }
        for shared, plan in plans.items()
        if all(shared in chosen for chosen in of_each)
    ]


def smaller_budgets(studies: list[Study], config: SparseAttentionConfig, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """What the same predicted loss buys: fewer candidates at the same density, or a smaller density.

    As for the curve, what is chosen on one document is priced on the others.
    """
    costs = [one.costs for one in studies]
    fields = [getattr(config, name) for name in FIELDS]
    density, loss = by_head(total(studies).costs, Allocation(*fields, 0, 0, 0))
    base, least = float(density.mean()), max(one.least_density for one in costs)

    def elsewhere(density: float, key_budget: float) -> float:
        chosen = [allocate(one, density, key_budget) for one in costs]
        pairs = [(choice, other) for i, choice in enumerate(chosen) for j, other in enumerate(costs) if i != j]
        return statistics.mean(float(by_head(other, choice)[1].nansum()) for choice, other in pairs)

    grids = {
        "fewer candidates": [(base, key_budget) for key_budget in range(1024, 63, -32)],
        "smaller density": [(least + (base - least) * i / 40, 1024) for i in range(40, 0, -1)],
    }
    losses = {kind: [elsewhere(*point) for point in grid] for kind, grid in grids.items()}
    rows = []
    for share in COMPARED_SHARES:
        added = statistics.mean(curve[round(share * len(studies[0].own))]["added_elsewhere"])
        for kind, grid in grids.items():
            within = list(takewhile(lambda loss: loss <= losses[kind][0] + added, losses[kind]))  # noqa: B023
            choice = allocate(total(studies).costs, *grid[max(len(within) - 1, 0)])
            numbers = {"density": choice.density, "mean_key_budget": choice.mean_key_budget}
            own = {name: getattr(choice, name) for name in FIELDS}
            rows.append({"kind": kind, "share": share, "added_loss": added, **numbers, "fields": own})
    trade = {kind: [[*point, loss] for point, loss in zip(grids[kind], losses[kind], strict=True)] for kind in grids}
    given = float(loss.nansum())
    return {"given_density": base, "given_loss": given, "trade": trade, "choices": rows}


@contextmanager
def sharing(plan: dict[Head, Head], config: SparseAttentionConfig) -> Iterator[None]:
    """The "torch" implementation with candidates taken as `plan` says, in the forwards of one document."""
    found: dict[tuple[Head, int], tuple[Tensor, Tensor]] = {}
    now = threading.local()
    sparse, select = torch_backend._sparse, RowChunk.select_slots
    needed: dict[Head, int] = {}
    for (layer, kv_head), source in plan.items():
        needed[source] = max(needed.get(source, 0), config.key_budget[layer][kv_head])

    def attend(call: Any, kv_head: int, *rest: Any) -> Tensor:
        now.head = call.pattern.layer_idx, kv_head
        return sparse(call, kv_head, *rest)

    def select_slots(chunk: RowChunk, query: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        order = chunk.index.order
        if now.head in plan:
            keys, count = found[plan[now.head], chunk.start]
            place = torch.empty_like(order)
            place[order.long()] = torch.arange(len(order), dtype=order.dtype)
            return place[keys[:, :budget].long()], count.clamp(max=budget)
        slots, count = select(chunk, query, max(budget, needed.get(now.head, 0)))
        if now.head in needed:
            found[now.head, chunk.start] = order[slots.long()], count
        return slots[:, :budget].contiguous(), count.clamp(max=budget)

    with mock.patch.object(torch_backend, "_sparse", attend), mock.patch.object(RowChunk, "select_slots", select_slots):
        yield


def measured(
    model: Any,
    config: SparseAttentionConfig,
    documents: list[Any],
    studies: list[Study],
    plans: list[dict[Head, Head]],
) -> list[dict[str, Any]]:
    """The loss of the real model with shared candidates, less that with its own."""
    rows = []
    for document, one in zip(documents, studies, strict=True):
        ids = torch.tensor([document["input_ids"]])
        with configured(model, config.replace(implementation="torch").to_dict()):
            losses = []
            for plan in [{}, *plans]:
                with sharing(plan, config):
                    losses.append(token_nll(model, ids).double())
                print(f"{document['name']}, {len(plan)} shared: {losses[-1].mean():.5f}", file=sys.stderr)
        for plan, loss in zip(plans, losses[1:], strict=True):
            difference = loss - losses[0]
            blocks = difference[config.dense_below - 1 :].unfold(0, 256, 256).mean(1)
            rows.append(
                {
                    "document": document["name"],
                    "share": len(plan) / len(one.own),
                    "predicted": one.loss(plan),
                    "measured": float(difference.mean()),
                    "standard_error": float(blocks.std() / len(blocks) ** 0.5) * len(blocks) * 256 / len(loss),
                }
            )
    return rows


@torch.no_grad()
def times(
    model: Any, config: SparseAttentionConfig, ids: Tensor, choices: list[dict[str, Any]], repeats: int
) -> dict[str, Any]:
    """Seconds of the processor of one prefill, of routing in it, and of its attention under each choice.

    Every layer is timed under all choices right after the prefill has computed it, so that they share what else the
    machine does.
    """
    configs = [config, *(config.replace(**choice["fields"]) for choice in choices)]
    attention = [0.0] * len(configs)
    routing = aside = 0.0

    def observer(pattern: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float, _: Tensor) -> None:
        nonlocal routing, aside
        begun = time.process_time()
        shape = query.shape[1], key.shape[1], query.shape[3]
        for _ in range(repeats):
            if pattern.dense_rows() is not None:
                routing += seconds(lambda: find_keys(query[0], key[0], pattern)) / repeats
            for i, other in enumerate(configs):
                own = layer_pattern(other, pattern.layer_idx, *shape, query.device, query.dtype)
                call = partial(document_attention, pattern=own, query_offset=0, key_offset=0, scaling=scaling)
                attention[i] += seconds(lambda: call(query[0], key[0], value[0])) / repeats  # noqa: B023
        aside += time.process_time() - begun

    model(input_ids=ids[:, : config.dense_below + 64], logits_to_keep=1, use_cache=False)  # compiles
    with observe(model, observer):
        prefill = seconds(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False)) - aside
    return {
        "threads": torch.get_num_threads(),
        "prefill": prefill,
        "routing": routing,
        "routing_share": routing / prefill,
        "attention": attention,
    }


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
