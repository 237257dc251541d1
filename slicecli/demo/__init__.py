"""The embedded demo: a small trained Llama in ``model/`` (the folder ``MODEL_FOLDER``) and text to calibrate
and evaluate it on, made at run time from the standard library's documentation, so that all works offline."""

from __future__ import annotations

from pathlib import Path

from slicecli.demo.text import documents

__all__ = ["MODEL_FOLDER", "documents"]

MODEL_FOLDER: Path = Path(__file__).resolve().parent / "model"
"""The embedded model: a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer`` read."""
