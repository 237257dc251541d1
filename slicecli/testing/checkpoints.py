"""Small checkpoints on disk: a byte tokenizer, nonsense text, and a complete model folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

__all__ = ["byte_tokenizer", "nonsense_text", "save_checkpoint"]

WORDS = "the a stream block norm head basis reads writes keeps small wide of and to"


def byte_tokenizer(adds_bos: bool = True) -> Any:
    """Return a byte tokenizer with 258 tokens; `<s>` is 0 and `</s>` is 1.

    Args:
        adds_bos: Put `<s>` before every text.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def nonsense_text(path: Path, documents: int = 120, seed: int = 0) -> Path:
    """Write documents of readable nonsense as JSON lines, about 130 bytes each.

    Args:
        path: The file, which should end in `.jsonl`.
        documents: How many.
        seed: Seed of the words.
    """
    generator = random.Random(seed)
    lines = [
        json.dumps({"text": " ".join(generator.choices(WORDS.split(), k=generator.randint(10, 40))) + "."})
        for _ in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_checkpoint(model: Any, folder: Path) -> Path:
    """Write a model as a checkpoint with the byte tokenizer, a chat template and a licence.

    Args:
        model: The model; its vocabulary must have 258 tokens or more.
        folder: The folder to make.
    """
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("Do as you please.\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n", encoding="utf-8")
    return folder
