"""Train the small Llama that slicecli ships for its demo and tests, and write it to ``slicecli/data/demo/model``.

Gather documentation prose from installed packages, train a byte-level BPE tokenizer, train the network in
float32 on the processor with a warm-up, constant, linear decay schedule, then measure, describe and save it
in bfloat16.

Example (the corpus and the checkpoints stay in the work folder; run again with the same one to go on)::

    python tools/train_demo_model.py --work-folder WORK --site-packages DIR --tokens 17000000
"""

from __future__ import annotations

import argparse
import ast
import email.parser
import importlib.metadata
import json
import math
import multiprocessing
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch
import torch.nn.functional as functional
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from slicecli.data.demo import text as demo_text  # noqa: E402

LAYERS = 8
HIDDEN = 96
HEADS = 6
KEY_VALUE_HEADS = 2
HEAD_DIM = 16
INTERMEDIATE = 320
VOCABULARY = 2048
POSITIONS = 512
EPSILON = 1e-5
THETA = 10000.0
BEGIN, END = "<s>", "</s>"
BEGIN_ID, END_ID = 0, 1

SHORT_ROW, LONG_ROW = 256, 512
PEAK_RATE = 3e-3
WARM_UP_STEPS = 200
WEIGHT_DECAY = 0.05
NEAR_DUPLICATE_WORDS = 12
SLICED_SIZES = (84, 72, 60)

Parameters = dict[str, Tensor]


# ----------------------------------------------------------------------------------------------------------
# The corpus.


def file_paragraphs(path: Path) -> list[str]:
    """Return the prose of one file: of its longer strings if it is Python, else of its whole text."""
    try:
        source = path.read_bytes()
        if path.suffix not in (".py", ".pyi"):
            content = source.decode("utf-8", "replace")
            if path.name in ("METADATA", "PKG-INFO"):
                content = str(email.parser.Parser().parsestr(content).get_payload())
            return demo_text.prose(content)
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    # Docstrings are not all: compiled functions get theirs from plain string constants elsewhere.
    constants = [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 60
    ]
    constants.sort(key=lambda pair: pair[0])
    return [paragraph for _, value in constants for paragraph in demo_text.prose(value)]


def is_wanted(relative: Path) -> bool:
    """Say whether a file of a package may hold documentation prose."""
    name = relative.name.lower()
    if name in ("metadata", "pkg-info"):
        return True
    if relative.suffix not in (".py", ".pyi", ".rst", ".md", ".txt"):
        return False
    if name.startswith(("licen", "copying", "notice", "test_", "requirements", "authors", "entry_points")):
        return False
    unwanted = {"test", "tests", "testing", "locale", "licenses"}
    return unwanted.isdisjoint(part.lower() for part in relative.parts[:-1])


def is_copyleft(metadata: Any) -> bool:
    """Say whether a distribution's metadata names a licence of the GPL family."""
    declared = [
        metadata.get("License-Expression") or "",
        (metadata.get("License") or "").split("\n")[0][:100],
    ]
    declared += [line for line in metadata.get_all("Classifier") or [] if line.startswith("License")]
    return any("GPL" in line or "General Public" in line for line in declared)


def package_files(site_packages: list[Path], sources: list[Path]) -> dict[str, list[Path]]:
    """Return the files to read, by ``name version`` of the package, of installed and of unpacked packages."""
    found: dict[str, list[Path]] = {}
    for folder in site_packages:
        for distribution in importlib.metadata.distributions(path=[str(folder)]):
            if is_copyleft(distribution.metadata) or distribution.metadata["Name"] == "slicecli":
                continue
            label = f"{distribution.metadata['Name'].lower()} {distribution.version}"
            wanted = [Path(str(file)) for file in distribution.files or [] if is_wanted(Path(str(file)))]
            found.setdefault(label, sorted(folder / file for file in wanted))
    for folder in sources:
        for package in sorted(path for path in folder.iterdir() if path.is_dir()):
            name, _, version = package.name.rpartition("-")
            listed = sorted(path for path in package.rglob("*") if is_wanted(path.relative_to(package)))
            found.setdefault(f"{name.lower()} {version}", []).extend(path for path in listed if path.is_file())
    return dict(sorted(found.items()))


def word_runs(paragraph: str) -> Iterator[tuple[str, ...]]:
    """Yield every run of ``NEAR_DUPLICATE_WORDS`` words of a paragraph, normalised."""
    words = demo_text.normalised(paragraph).split()
    for start in range(len(words) - NEAR_DUPLICATE_WORDS + 1):
        yield tuple(words[start : start + NEAR_DUPLICATE_WORDS])


def gather_corpus(site_packages: list[Path], sources: list[Path]) -> tuple[list[str], dict[str, int]]:
    """Return the training documents and the number of bytes from each package.

    No paragraph occurs twice, none occurs in the held-out part, and none shares a run of words with it.
    """
    held_out = [line for document in demo_text.documents("heldout") for line in document.split("\n")]
    seen = {demo_text.normalised(line) for line in held_out}
    barred = {run for line in held_out for run in word_runs(line)}
    documents: list[str] = []
    sizes: dict[str, int] = {}

    def add(label: str, paragraphs: list[str]) -> None:
        kept = []
        for paragraph in paragraphs:
            key = demo_text.normalised(paragraph)
            if key in seen:
                continue
            seen.add(key)
            if not any(run in barred for run in word_runs(paragraph)):
                kept.append(paragraph)
        if sum(map(len, kept)) >= 80:
            documents.append("\n".join(kept))
            sizes[label] = sizes.get(label, 0) + len(documents[-1])

    for document in demo_text.documents("train"):
        add("python " + sysconfig.get_python_version(), document.split("\n"))
    with multiprocessing.Pool(2) as pool:
        for label, paths in package_files(site_packages, sources).items():
            for paragraphs in pool.imap(file_paragraphs, paths, chunksize=16):
                add(label, paragraphs)
    return documents, sizes


# ----------------------------------------------------------------------------------------------------------
# The tokenizer.


def train_tokenizer(documents: list[str], folder: Path) -> None:
    """Train the byte-level BPE tokenizer and write its two files."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
        "padding_side": "left",
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def encode(documents: list[str], folder: Path) -> list[list[int]]:
    """Return the token ids of each document, without the special ones."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]


# ----------------------------------------------------------------------------------------------------------
# The network, as a function of a dictionary of tensors: the width is whatever the tensors have.


def initial_parameters(seed: int) -> Parameters:
    """Return freshly drawn parameters; what writes to the stream starts smaller, the deeper the stack."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int, deviation: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * deviation

    reading = HIDDEN**-0.5
    parameters = {
        "embedding": draw(VOCABULARY, HIDDEN, 0.3),
        "head": draw(VOCABULARY, HIDDEN, 0.3 * reading),
        "final_norm": torch.ones(HIDDEN),
    }
    writing = (2 * LAYERS) ** -0.5
    for layer in range(LAYERS):
        parameters[f"{layer}.attention_norm"] = torch.ones(HIDDEN)
        parameters[f"{layer}.mlp_norm"] = torch.ones(HIDDEN)
        parameters[f"{layer}.qkv"] = draw((HEADS + 2 * KEY_VALUE_HEADS) * HEAD_DIM, HIDDEN, reading)
        parameters[f"{layer}.output"] = draw(HIDDEN, HEADS * HEAD_DIM, writing * (HEADS * HEAD_DIM) ** -0.5)
        parameters[f"{layer}.gate_up"] = draw(2 * INTERMEDIATE, HIDDEN, reading)
        parameters[f"{layer}.down"] = draw(HIDDEN, INTERMEDIATE, writing * INTERMEDIATE**-0.5)
    return parameters


def rotary(length: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and the signed sines of the rotary embedding for positions 0 to ``length - 1``."""
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)


def logits_of(
    parameters: Parameters, tokens: Tensor, epsilon: float = EPSILON, watched: list[Tensor] | None = None
) -> Tensor:
    """Return the logits for rows of tokens; ``watched`` receives the input of every norm."""
    rows, length = tokens.shape
    cosines, sines = rotary(length)
    mask = torch.full((length, length), -1e9).triu(1)
    grouped = HEADS // KEY_VALUE_HEADS

    def norm(stream: Tensor, weight: Tensor) -> Tensor:
        if watched is not None:
            watched.append(stream)
        return functional.rms_norm(stream, (stream.shape[-1],), weight, epsilon)

    stream = parameters["embedding"][tokens]
    for layer in range(LAYERS):
        mixed = functional.linear(norm(stream, parameters[f"{layer}.attention_norm"]), parameters[f"{layer}.qkv"])
        mixed = mixed.view(rows, length, HEADS + 2 * KEY_VALUE_HEADS, HEAD_DIM)
        turned = mixed[:, :, : HEADS + KEY_VALUE_HEADS]
        turned = turned * cosines[:, None] + torch.roll(turned, HEAD_DIM // 2, -1) * sines[:, None]
        queries = turned[:, :, :HEADS].transpose(1, 2)
        keys = turned[:, :, HEADS:].transpose(1, 2).repeat_interleave(grouped, 1)
        values = mixed[:, :, HEADS + KEY_VALUE_HEADS :].transpose(1, 2).repeat_interleave(grouped, 1)
        # Written out: for heads this small, the compiled softmax is faster than the fused attention.
        weights = ((queries @ keys.transpose(-1, -2)) * HEAD_DIM**-0.5 + mask).softmax(-1)
        attended = (weights @ values).transpose(1, 2).reshape(rows, length, HEADS * HEAD_DIM)
        stream = stream + functional.linear(attended, parameters[f"{layer}.output"])
        inner = functional.linear(norm(stream, parameters[f"{layer}.mlp_norm"]), parameters[f"{layer}.gate_up"])
        gate, up = inner.chunk(2, -1)
        stream = stream + functional.linear(functional.silu(gate) * up, parameters[f"{layer}.down"])
    return functional.linear(norm(stream, parameters["final_norm"]), parameters["head"])


def loss_of(parameters: Parameters, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of predicting each token of the rows from those before it."""
    logits = logits_of(parameters, rows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


# ----------------------------------------------------------------------------------------------------------
# Training.


def learning_rate(step: int, steps: int, decay_share: float) -> float:
    """Return the rate of a step: linear warm-up, constant, then linear decay to zero."""
    decay_steps = int(decay_share * steps)
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / decay_steps)


def batch_of(stream: numpy.ndarray, step: int, length: int, batch_tokens: int, seed: int) -> Tensor:
    """Return the rows of a step: slices of the token stream, shuffled, each behind a begin token."""
    rows_in_batch = batch_tokens // length
    starts = (len(stream) - 2 * length) // length
    epoch, place = divmod(step, starts // rows_in_batch)
    generator = numpy.random.default_rng([seed, length, epoch])
    offset = int(generator.integers(length))
    order = generator.permutation(starts)[place * rows_in_batch : (place + 1) * rows_in_batch]
    rows = numpy.full((rows_in_batch, length + 1), BEGIN_ID, dtype=numpy.int64)
    for row, start in zip(rows, order, strict=True):
        row[1:] = stream[offset + start * length :][:length]
    return torch.from_numpy(rows)


def worker(rank: int, arguments: argparse.Namespace) -> None:
    """Train in one of several processes that average their gradients: faster than threads in one process."""
    import torch.distributed

    torch.set_num_threads(1)
    work_folder = Path(arguments.work_folder)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{work_folder.resolve()}/rendezvous",
        rank=rank,
        world_size=arguments.workers,
    )
    stream = numpy.load(work_folder / "train.npy", mmap_mode="r")
    held_out = torch.from_numpy(numpy.load(work_folder / "heldout_rows.npy")[:48].astype(numpy.int64))
    steps = arguments.tokens // arguments.batch_tokens
    long_from = steps - int(arguments.decay_share * steps)
    parameters = {name: tensor.requires_grad_() for name, tensor in initial_parameters(arguments.seed).items()}
    matrices = [tensor for tensor in parameters.values() if tensor.ndim == 2]
    vectors = [tensor for tensor in parameters.values() if tensor.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    first = 0
    batches: list[tuple[int, int]] = [(0, arguments.batch_tokens)]
    checkpoint = work_folder / "checkpoint.pt"
    if checkpoint.exists():
        stored = torch.load(checkpoint)
        # Counted in tokens, so that a run may go on with another batch size.
        first = stored["tokens"] // arguments.batch_tokens
        batches = stored["batches"]
        if batches[-1][1] != arguments.batch_tokens:
            batches.append((stored["tokens"], arguments.batch_tokens))
        with torch.no_grad():
            for name, tensor in parameters.items():
                tensor.copy_(stored["parameters"][name])
        optimiser.load_state_dict(stored["optimiser"])
    compiled = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of

    def save(step: int) -> None:
        partial = checkpoint.with_suffix(".partial")
        stored = {
            "tokens": step * arguments.batch_tokens,
            "batches": batches,
            "parameters": {name: tensor.detach().clone() for name, tensor in parameters.items()},
            "optimiser": optimiser.state_dict(),
        }
        torch.save(stored, partial)
        partial.replace(checkpoint)

    begun = saved = shown = time.monotonic()
    share = arguments.batch_tokens // arguments.workers
    for step in range(first, steps):
        # Long rows cost more: every second step of the decay is enough to learn the later positions.
        length = LONG_ROW if step >= long_from and step % 2 else SHORT_ROW
        rows = batch_of(stream, step, length, arguments.batch_tokens, arguments.seed)
        own = rows[rank * share // length : (rank + 1) * share // length]
        pieces = own.split(max(1, arguments.piece_tokens // length))
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for piece in pieces:
            loss = compiled(parameters, piece) / len(pieces)
            loss.backward()
            total += float(loss.detach())
        gradients = torch.cat([tensor.grad.flatten() for tensor in parameters.values()])  # type: ignore[union-attr]
        torch.distributed.all_reduce(gradients)
        gradients /= arguments.workers
        gradients *= min(1.0, 1.0 / (float(gradients.norm()) + 1e-6))
        split = gradients.split([tensor.numel() for tensor in parameters.values()])
        for tensor, gradient in zip(parameters.values(), split, strict=True):
            tensor.grad = gradient.view_as(tensor)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, arguments.decay_share)
        optimiser.step()
        if rank == 0:
            now = time.monotonic()
            if now - shown > 90 or step + 1 == steps:
                with torch.no_grad():
                    validation = sum(float(loss_of(parameters, part)) for part in held_out.split(8)) / 6
                speed = (step + 1 - first) * arguments.batch_tokens / (now - begun)
                losses = f"loss {total:.3f} held-out {validation:.3f}"
                print(f"step {step + 1}/{steps} {losses} {speed:.0f} tokens/s", flush=True)
                shown = now
            if now - saved > arguments.save_seconds or step + 1 == steps:
                save(step + 1)
                saved = now
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------
# Measuring.


def held_out_rows(encoded: list[list[int]], length: int) -> numpy.ndarray:
    """Return held-out documents as rows of ``length + 1``, each behind a begin token and of one document.

    A document's last row is padded with ``-100``.
    """
    rows = []
    for ids in encoded:
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            rows.append([BEGIN_ID, *part, *[-100] * (length - len(part))])
    return numpy.array(rows, dtype=numpy.int64)


@torch.no_grad()
def total_loss(parameters: Parameters, rows: Tensor, epsilon: float = EPSILON) -> tuple[float, int]:
    """Return the summed cross-entropy in nats and the number of tokens predicted."""
    total = 0.0
    for part in rows.split(8):
        logits = logits_of(parameters, part[:, :-1].clamp(min=0), epsilon)
        total += float(functional.cross_entropy(logits.flatten(0, 1).double(), part[:, 1:].flatten(), reduction="sum"))
    return total, int((rows[:, 1:] >= 0).sum())


@torch.no_grad()
def shared_basis(parameters: Parameters, rows: Tensor) -> Tensor:
    """Return the eigenvectors, largest first, of the summed second moments of all normalised norm inputs."""
    moment = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    for part in rows.split(8):
        watched: list[Tensor] = []
        logits_of(parameters, part[:, :-1], watched=watched)
        for stream in watched:
            flat = stream.flatten(0, 1).double()
            flat = flat / flat.square().mean(-1, keepdim=True).add(EPSILON).sqrt()
            moment += flat.T @ flat
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)


def projected(parameters: Parameters, basis: Tensor, kept: int) -> tuple[Parameters, float]:
    """Return the parameters with the stream projected onto ``kept`` directions, and the norms' epsilon."""
    turn = basis[:, :kept]
    scale = math.sqrt(HIDDEN / kept)
    result: Parameters = {}

    def read(weight: Tensor, gain: Tensor) -> Tensor:
        return (weight.double() * gain.double() @ turn * scale).float()

    result["embedding"] = (parameters["embedding"].double() @ turn).float()
    result["head"] = read(parameters["head"], parameters["final_norm"])
    result["final_norm"] = torch.ones(kept)
    for layer in range(LAYERS):
        for reader, norm in (("qkv", "attention_norm"), ("gate_up", "mlp_norm")):
            result[f"{layer}.{reader}"] = read(parameters[f"{layer}.{reader}"], parameters[f"{layer}.{norm}"])
            result[f"{layer}.{norm}"] = torch.ones(kept)
        for writer in ("output", "down"):
            result[f"{layer}.{writer}"] = (turn.T @ parameters[f"{layer}.{writer}"].double()).float()
    return result, EPSILON * HIDDEN / kept


# ----------------------------------------------------------------------------------------------------------
# Writing the folder.


def save_model(parameters: Parameters, folder: Path) -> None:
    """Write the network as a ``LlamaForCausalLM`` in bfloat16."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=EPSILON,
        rope_theta=THETA,
        tie_word_embeddings=False,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    model = LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": parameters["embedding"],
        "model.norm.weight": parameters["final_norm"],
        "lm_head.weight": parameters["head"],
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        sizes = [HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM]
        for letter, weight in zip("qkv", parameters[f"{layer}.qkv"].split(sizes), strict=True):
            state[f"{prefix}self_attn.{letter}_proj.weight"] = weight
        for kind, weight in zip(("gate", "up"), parameters[f"{layer}.gate_up"].chunk(2), strict=True):
            state[f"{prefix}mlp.{kind}_proj.weight"] = weight
        state[f"{prefix}self_attn.o_proj.weight"] = parameters[f"{layer}.output"]
        state[f"{prefix}mlp.down_proj.weight"] = parameters[f"{layer}.down"]
        state[f"{prefix}input_layernorm.weight"] = parameters[f"{layer}.attention_norm"]
        state[f"{prefix}post_attention_layernorm.weight"] = parameters[f"{layer}.mlp_norm"]
    model.load_state_dict(state)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN_ID, eos_token_id=END_ID, pad_token_id=END_ID, max_new_tokens=64
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def sample(folder: Path, prompt: str, seed: int) -> str:
    """Return the saved model's continuation of a prompt, drawn at temperature 0.7."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=0.7,
        top_k=50,
        max_new_tokens=90,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write the model's card from the measured facts."""
    sizes = facts["corpus_bytes"]
    batches = ", ".join(
        f"batches of {size:,} tokens" + (f" from token {start:,} on" if start else "")
        for start, size in facts["batches"]
    )
    packages = ", ".join(f"{label} ({size / 1e6:.2f} MB)" for label, size in sizes.items())
    slices = "\n".join(
        f"| {kept} | {perplexity:.2f} | {100 * (perplexity / facts['perplexity'] - 1):+.1f} % |"
        for kept, perplexity in facts["sliced"].items()
    )
    samples = "\n\n".join("> " + line.replace("\n", "\n>\n> ") for line in facts["samples"])
    card = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The slicecli demo model

A very small Llama, made for slicecli's demo and tests: narrow, so that it uses its whole width and slicing it
has a visible price. It writes text that looks like Python documentation. It knows nothing and is good for
nothing else.

| | |
|---|---|
| Architecture | `LlamaForCausalLM`: hidden size {HIDDEN}, {LAYERS} layers, {HEADS} heads, \
{KEY_VALUE_HEADS} key-value heads of {HEAD_DIM}, intermediate size {INTERMEDIATE}, untied head, no biases |
| Parameters | {facts["parameters"]:,}, stored in bfloat16 |
| Tokenizer | byte-level BPE, {VOCABULARY} entries, `<s>` before every text |
| Positions | {POSITIONS} (trained on rows of {SHORT_ROW} tokens, in the decay also of {LONG_ROW}) |
| Trained on | {facts["tokens"]:,} tokens ({facts["epochs"]:.1f} times through {facts["stream_tokens"]:,}) |
| Held-out perplexity | {facts["perplexity"]:.2f} per token |
| Held-out bits per byte | {facts["bits_per_byte"]:.3f} |

## Training

`tools/train_demo_model.py` made this folder: AdamW (betas 0.9 and 0.95, weight decay {WEIGHT_DECAY} on
matrices), learning rate {PEAK_RATE} with {WARM_UP_STEPS} steps of warm-up, constant, then decayed linearly to
zero over the last {100 * facts["decay_share"]:.1f} % of the tokens; {batches};
gradient norm clipped to 1; float32; seed {facts["seed"]}. {facts["remark"]}

The corpus is the English prose ({sum(sizes.values()) / 1e6:.1f} MB, no code, tables or signatures) in the
docstrings and documentation files of Python's standard library and of packages, listed at the end.

## Measures

The held-out text is `slicecli.data.demo.documents("heldout")` of Python {facts["python"]}:
{facts["held_out_bytes"]:,} bytes, {facts["held_out_tokens"]:,} tokens, from modules and topics chosen by the
hash of their names. No paragraph of it, nor any run of {NEAR_DUPLICATE_WORDS} words, is in the training
corpus. Every document is cut into rows of {SHORT_ROW} tokens, each behind `<s>`; the weights are the stored
ones. In rows of {LONG_ROW} tokens the perplexity is {facts["long_perplexity"]:.2f}.

How far the model uses its width: the perplexity after plain projection of the residual stream onto the
leading directions of one PCA basis shared by all layers (no refit; the basis from
{facts["basis_tokens"]:,} training tokens):

| Hidden size | Perplexity | Change |
|---|---|---|
| {HIDDEN} | {facts["perplexity"]:.2f} | |
{slices}

## Samples

Drawn at temperature 0.7 among the 50 likeliest tokens; the first words are the prompt.

{samples}

## Packages in the corpus

{packages}.

## Licence

Apache-2.0.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def finish(arguments: argparse.Namespace, work_folder: Path, folder: Path) -> None:
    """Measure the checkpoint, then write the model's folder."""
    torch.set_num_threads(2)
    stored = torch.load(work_folder / "checkpoint.pt")
    parameters = {name: tensor.bfloat16().float() for name, tensor in stored["parameters"].items()}
    documents = demo_text.documents("heldout")
    held_out_bytes = sum(map(len, documents))
    encoded = encode(documents, work_folder)
    total, tokens = total_loss(parameters, torch.from_numpy(held_out_rows(encoded, SHORT_ROW)))
    long_total, _ = total_loss(parameters, torch.from_numpy(held_out_rows(encoded, LONG_ROW)))
    stream = numpy.load(work_folder / "train.npy", mmap_mode="r")
    basis_rows = batch_of(stream, 0, SHORT_ROW, 32768, arguments.seed + 1)
    basis = shared_basis(parameters, basis_rows)
    sliced = {}
    for kept in SLICED_SIZES:
        changed, epsilon = projected(parameters, basis, kept)
        loss, _ = total_loss(changed, torch.from_numpy(held_out_rows(encoded, SHORT_ROW)), epsilon)
        sliced[kept] = math.exp(loss / tokens)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(parameters, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((work_folder / name).read_bytes())
    prompts = ("Return a new", "This module provides", "If the file")
    facts = {
        "parameters": sum(tensor.numel() for tensor in parameters.values()),
        "tokens": stored["tokens"],
        "batches": stored["batches"],
        "decay_share": arguments.decay_share,
        "remark": arguments.remark,
        "stream_tokens": len(stream),
        "epochs": stored["tokens"] / len(stream),
        "seed": arguments.seed,
        "python": sysconfig.get_python_version(),
        "corpus_bytes": json.loads((work_folder / "corpus_bytes.json").read_text(encoding="utf-8")),
        "held_out_bytes": held_out_bytes,
        "held_out_tokens": tokens,
        "perplexity": math.exp(total / tokens),
        "long_perplexity": math.exp(long_total / tokens),
        "bits_per_byte": total / math.log(2) / held_out_bytes,
        "basis_tokens": basis_rows[:, :-1].numel(),
        "sliced": sliced,
        "samples": [sample(folder, prompt, arguments.seed + 1) for prompt in prompts],
    }
    write_card(folder, facts)
    print(json.dumps({key: value for key, value in facts.items() if key != "corpus_bytes"}, indent=2))


def prepare(arguments: argparse.Namespace, work_folder: Path) -> None:
    """Gather the corpus, train the tokenizer and store the token stream, unless the work folder has them."""
    if (work_folder / "heldout_rows.npy").exists():
        return
    own = Path(sysconfig.get_path("purelib"))
    documents, sizes = gather_corpus([own, *map(Path, arguments.site_packages)], list(map(Path, arguments.sources)))
    print(f"corpus: {len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB", flush=True)
    (work_folder / "corpus_bytes.json").write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    train_tokenizer(documents, work_folder)
    order = numpy.random.default_rng(arguments.seed).permutation(len(documents))
    stream: list[int] = []
    for ids in encode([documents[index] for index in order], work_folder):
        stream += [BEGIN_ID, *ids, END_ID]
    print(f"stream: {len(stream)} tokens", flush=True)
    numpy.save(work_folder / "train.npy", numpy.array(stream, dtype=numpy.uint16))
    # Documents long enough to fill a row stand in for all of them while training.
    rows = held_out_rows(encode(demo_text.documents("heldout"), work_folder), SHORT_ROW)
    whole = rows[(rows >= 0).all(1)]
    chosen = numpy.random.default_rng(arguments.seed).permutation(len(whole))
    numpy.save(work_folder / "heldout_rows.npy", whole[chosen])


def main() -> None:
    """Read the command line and run the steps that are still to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-folder", required=True, help="folder for the corpus, the tokens and checkpoints")
    parser.add_argument("--site-packages", action="append", default=[], help="another folder of installed packages")
    parser.add_argument("--sources", action="append", default=[], help="a folder of unpacked NAME-VERSION sources")
    parser.add_argument("--output", default=str(REPOSITORY / "slicecli" / "demo" / "model"))
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens to train on")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--piece-tokens", type=int, default=2048, help="tokens a process takes at once")
    parser.add_argument("--workers", type=int, default=2, help="processes that train")
    parser.add_argument("--decay-share", type=float, default=0.15, help="share of the tokens to decay in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-seconds", type=float, default=120.0)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    parser.add_argument("--remark", default="", help="how this run departed from the plan, for the card")
    parser.add_argument("--finish-only", action="store_true", help="only measure and write the last checkpoint")
    arguments = parser.parse_args()
    work_folder = Path(arguments.work_folder)
    work_folder.mkdir(parents=True, exist_ok=True)
    if not arguments.finish_only:
        prepare(arguments, work_folder)
        (work_folder / "rendezvous").unlink(missing_ok=True)
        import torch.multiprocessing

        torch.multiprocessing.spawn(worker, args=(arguments,), nprocs=arguments.workers)
    finish(arguments, work_folder, Path(arguments.output))


if __name__ == "__main__":
    main()
