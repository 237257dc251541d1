"""The embedded demo: a small trained Llama, and text to calibrate and evaluate it on.

The model lies in ``model/`` (``MODEL_FOLDER``); the text is made at run time from the standard library's
documentation; so everything works offline.
"""

from __future__ import annotations

from pathlib import Path

from slicecli.data.demo.text import documents

__all__ = ["MODEL_FOLDER", "documents"]

MODEL_FOLDER: Path = Path(__file__).resolve().parent / "model"
"""The embedded model: a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer`` read."""
