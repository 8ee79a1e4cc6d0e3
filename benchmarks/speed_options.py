"""The options of speed.py, and their defaults by device."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from speed_cases import EARLY, MODELS_FIRST, RIVALS, SMALLER_MODEL
from speed_inputs import CONTENTS
from speed_models import MODELS

RESULTS = Path(__file__).parent / "results"
ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
ALL_REDUCTIONS = (0.0, 0.5, 0.667, 0.778, 0.889, 0.95)
# Defaults by device, and for tests.
DEFAULTS = {
    "cuda": {
        "size": "full",
        "dtype": "bfloat16",
        "models": MODELS_FIRST,
        "contents": CONTENTS,
        "tokens": (256, 1024, 4096, 16384),
        "batches": (1, 8),
        "pictures": 8,
        "frames": 64,
        "reductions": ALL_REDUCTIONS,
        "rivals": tuple(RIVALS),
        "rivals_at": (0.667, 0.778, 0.889),
        "text": 64,
        "threads": 8,
        "brief": False,
        "budget": float("inf"),
        "new_tokens": 128,
        "rounds": 10,
        "warmup": 2,
        "limit": 300.0,
    },
    "cpu": {
        "size": "reduced",
        "dtype": "float32",
        "models": MODELS_FIRST,
        "contents": CONTENTS,
        "tokens": (256, 576),
        "batches": (1, 2),
        "pictures": 2,
        "frames": 4,
        "reductions": ALL_REDUCTIONS,
        "rivals": tuple(RIVALS),
        "rivals_at": (0.889,),
        "text": 32,
        "threads": 1,
        "brief": True,
        "budget": 420.0,
        "new_tokens": 8,
        "rounds": 3,
        "warmup": 1,
        "limit": 60.0,
    },
    "quick": {
        "size": "quick",
        "dtype": "float32",
        "models": ("qwen2.5-vl-7b",),
        "contents": ("picture",),
        "tokens": (64,),
        "batches": (1,),
        "pictures": 2,
        "frames": 4,
        "reductions": (0.0, 0.889),
        "rivals": (EARLY, "FastV", "VisionZip", SMALLER_MODEL),
        "rivals_at": (0.889,),
        "text": 16,
        "threads": 1,
        "brief": False,
        "budget": float("inf"),
        "new_tokens": 3,
        "rounds": 2,
        "warmup": 1,
        "limit": 30.0,
    },
}


def importable(attn: str) -> bool:
    """Whether an attention implementation can run here."""
    module = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attn)
    return module is None or find_spec(module) is not None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Encoder, prefill, first token, decoding and memory, patched against unpatched.",
        epilog="Defaults depend on --device and --quick; see DEFAULTS in speed_options.py.",
    )
    add = parser.add_argument
    add("--device", default="cpu")
    add("--quick", action="store_true", help="one tiny model, a minute at most: whether it runs at all")
    add("--size", choices=("full", "reduced", "quick"), help="of the models")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--models", nargs="+", choices=tuple(MODELS))
    add("--attn", nargs="+", choices=ATTENTIONS, help="default: all that are importable; sdpa on a CPU")
    add("--contents", nargs="+", choices=CONTENTS)
    add("--tokens", nargs="+", type=int, help="visual tokens of a prompt, as near as the family can")
    add("--batches", nargs="+", type=int)
    add("--pictures", type=int, help="how many `pictures` are")
    add("--frames", type=int, help="of a video")
    add("--reductions", nargs="+", type=float)
    add("--rivals", nargs="*", choices=tuple(RIVALS))
    add("--rivals-at", nargs="+", type=float, help="reductions at which rivals are measured")
    add("--text", type=int, help="text tokens of a prompt")
    add("--new-tokens", type=int, help="tokens to generate; 0 leaves decoding out")
    brief = "all reductions, and rivals, in each model's first case alone"
    add("--brief", action=argparse.BooleanOptionalAction, help=f"{brief}; the default on a CPU")
    add("--rounds", type=int)
    add("--warmup", type=int)
    add("--decode-rounds", type=int, default=1)
    add("--limit", type=float, help="seconds a case may take before its rounds are cut")
    add("--budget", type=float, help="seconds after which no further case begins; CPU: 420")
    add("--threads", type=int, help="of torch, on a CPU")
    add("--profile", action="store_true", help="say, too, where prefills' time goes, in <csv>_profile.csv")
    add("--csv", type=Path, help="default: benchmarks/results/speed_<device>.csv")
    add("--plot", type=Path, help="without a suffix; default: beside the CSV, .png and .svg")
    add("--markdown", type=Path, help="write the block for the README; measures nothing")
    add("--show", action="store_true", help="measure nothing: table and plot of what the CSV holds")
    add("--inject-oom", default="", metavar="ARM", help="for tests: this arm runs out of memory")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available() and not (options.show or options.markdown):
        parser.error("torch finds no CUDA device")
    defaults = DEFAULTS["quick" if options.quick else "cuda" if cuda else "cpu"]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.attn is None:
        options.attn = [a for a in ATTENTIONS if importable(a)] if cuda else ["sdpa"]
    wrong = [a for a in options.attn if not importable(a) or (a != "sdpa" and not cuda)]
    if wrong:
        parser.error(f"{', '.join(wrong)} cannot run here")
    if any(not 0 <= r < 1 for r in (*options.reductions, *options.rivals_at)):
        parser.error("a reduction is a share of the tokens, from 0 up to below 1")
    if options.csv is None:
        kind = options.device.split(":")[0]
        options.csv = RESULTS / f"speed_{kind}{'_quick' if options.quick else ''}.csv"
    if options.plot is None:
        options.plot = options.csv.with_suffix("")
    return options
