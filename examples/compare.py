"""Run a vision-language model with and without illava, side by side, on a photograph and a clip.

    python examples/compare.py                                     # random weights, no download
    python examples/compare.py --model Qwen/Qwen2.5-VL-7B-Instruct # real weights

For each of the two inputs it shows what the model says, how many visual tokens each layer leaves,
how long the first token takes and how much memory that needs.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

try:
    import av
    import numpy as np
    import psutil
    import torch
    from PIL import Image
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from sklearn.datasets import load_sample_image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    import illava
    import tiny_checkpoint
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'compare.py needs {missing.name}, which is not installed: run `pip install ".[examples]"`'
    ) from missing

MAX_FRAMES = 16
TRUSTED_SPREAD = 1.5  # two cores at rest stay below 1.2
MEMORY_RUNS = 3  # odd, so that the median is one of them

# Wide enough for arithmetic to outweigh Python's share of the time, small enough for two CPU
# cores; encoder and language model cost about as much as each other.
RANDOM_SHAPE: dict[str, Any] = {
    "hidden": 320,
    "heads": 5,
    "text": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class Side:
    """What one of the two models, unpatched or patched, did with one input."""

    text: str
    prefill_runs: list[float]  # seconds, one for each run
    peak_bytes: float

    @property
    def prefill_seconds(self) -> float:
        """Time to the first token: the median of the runs."""
        return statistics.median(self.prefill_runs)

    @property
    def spread(self) -> float:
        """The slowest run by the fastest: near 1 on a machine that does nothing else."""
        return max(self.prefill_runs) / min(self.prefill_runs)


@dataclass(frozen=True)
class Comparison:
    """Both models on one input, and illava's own account of the patched one."""

    title: str
    unpatched: Side
    patched: Side
    report: illava.Report


class Model:
    """A model with its processor, and the three things measured of it."""

    def __init__(self, name: str | Path, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.processor = AutoProcessor.from_pretrained(name)
        self.model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True)
        self.model.to(device).eval()

    def inputs(self, kind: str, prompt: str, **pictures: Any) -> dict[str, Any]:
        """The prompt with one picture (`images=`) or clip (`videos=`), ready for `generate`."""
        content = [{"type": kind}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        batch = self.processor(text=[text], return_tensors="pt", **pictures).to(self.device)
        # Only the pixels change type: bfloat16 would also round the seconds between frames.
        return {
            key: value.to(self.model.dtype) if key.startswith("pixel_values") else value
            for key, value in batch.items()
        }

    def generate(self, inputs: Mapping[str, Any], max_new_tokens: int) -> torch.Tensor:
        """The new token ids, chosen greedily so that both sides can be compared."""
        ids = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,  # these three: checkpoints that sample carry them, and
            top_p=None,  # transformers warns when they are left over
            top_k=None,
        )
        return ids[0, inputs["input_ids"].shape[1] :]

    def text(self, inputs: Mapping[str, Any], max_new_tokens: int) -> str:
        """What the model answers."""
        ids = self.generate(inputs, max_new_tokens)
        return self.processor.decode(ids, skip_special_tokens=True).strip()

    def prefill_seconds(self, inputs: Mapping[str, Any]) -> float:
        """Time to the first token: encoder, prefill of the language model, one token."""
        self._synchronize()
        start = time.perf_counter()
        self.generate(inputs, max_new_tokens=1)
        self._synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, inputs: Mapping[str, Any]) -> int:
        """The most memory in use up to the first token, beyond what was in use before."""

        def prefill() -> None:
            self.generate(inputs, max_new_tokens=1)

        if self.device.type != "cuda":
            return _resident_growth(prefill)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        prefill()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _resident_growth(call: Callable[[], None]) -> int:
    """The peak growth of this process's resident set during `call`, sampled every millisecond."""
    # Memory that earlier calls freed but malloc kept would be used again without a trace.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        call()
    finally:
        done.set()
        sampler.join()
    return peak - before


def photograph(path: Path | None) -> Image.Image:
    """The picture at `path`, or the temple that scikit-learn ships (640×427)."""
    if path is not None:
        return Image.open(path).convert("RGB")
    return Image.fromarray(load_sample_image("china.jpg"))


def write_clip(path: Path) -> Path:
    """Write 16 frames, 2 a second: a camera closes in on the flower that scikit-learn ships."""
    flower = Image.fromarray(load_sample_image("flower.jpg"))  # 640×427
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 336, 224, "yuv420p"
        for step in np.linspace(0, 1, MAX_FRAMES):
            width = 600 - 250 * step
            left, top = step * 200, step * 100
            box = (left, top, left + width, top + width * 224 / 336)
            frame = flower.resize((336, 224), Image.Resampling.BICUBIC, box=box)
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())  # the frames that the encoder still holds
    return path


def read_clip(path: Path) -> dict[str, Any]:
    """Up to 16 evenly spaced frames [T, H, W, 3] of a video, as the processor's arguments."""
    try:
        with av.open(path) as container:
            rate = float(container.streams.video[0].average_rate or 24)
            total = sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.error.InvalidDataError, IndexError) as error:  # no container, or only sound in it
        raise SystemExit(f"--video {path} holds no video that FFmpeg can read; give another file") from error
    wanted = set(np.linspace(0, total - 1, min(MAX_FRAMES, total)).round().astype(int).tolist())
    with av.open(path) as container:
        frames = [
            frame.to_ndarray(format="rgb24")
            for index, frame in enumerate(container.decode(video=0))
            if index in wanted
        ]
    fps = rate * len(frames) / total
    # transformers 4 reads the frame rate from `fps`, 5 from the metadata.
    return {
        "videos": [np.stack(frames)],
        "fps": fps,
        "video_metadata": [
            {
                "total_num_frames": len(frames),
                "fps": fps,
                "frames_indices": list(range(len(frames))),
            }
        ],
        "do_sample_frames": False,
    }


def compare(
    model: Model,
    inputs: Mapping[str, Any],
    title: str,
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> Comparison:
    """Measure the model without and with illava on one input; `say` tells what is under way."""

    def patched() -> illava.Handle:
        return illava.patch(model.model, reduction=options.reduction)

    say(f"{title}: generating")  # and warming up
    text = model.text(inputs, options.max_new_tokens)
    with patched() as handle:
        patched_text = model.text(inputs, options.max_new_tokens)
        report = handle.report
    if report is None:
        raise RuntimeError(f"{title}: illava saw no visual tokens; does the model take this input?")

    # In turns, so that a busy moment of the machine falls on both sides.
    seconds, patched_seconds = [], []
    for run in range(1, options.runs + 1):
        say(f"{title}: timing the first token, run {run} of {options.runs}")
        seconds.append(model.prefill_seconds(inputs))
        with patched():
            patched_seconds.append(model.prefill_seconds(inputs))

    say(f"{title}: measuring memory")  # apart from the timing, which the sampling would disturb
    peaks, patched_peaks = [], []
    for _ in range(MEMORY_RUNS):
        peaks.append(model.peak_bytes(inputs))
        with patched():
            patched_peaks.append(model.peak_bytes(inputs))
    return Comparison(
        title,
        Side(text, seconds, statistics.median(peaks)),
        Side(patched_text, patched_seconds, statistics.median(patched_peaks)),
        report,
    )


def result_table(result: Comparison) -> Table:
    """Both sides of one input: what was said, how fast, with how much memory."""
    pictures, flops = result.report.pictures, result.report.flops
    tokens = sum(picture.tokens for picture in pictures)
    final_tokens = sum(picture.final_tokens for picture in pictures)
    bound = (flops.vision.without + flops.language.without) / (flops.vision.with_ + flops.language.with_)
    speedup = result.unpatched.prefill_seconds / result.patched.prefill_seconds
    caption = f"first token {speedup:.2f}× as fast; {bound:.2f}× less arithmetic"
    spread = max(result.unpatched.spread, result.patched.spread)
    if spread > TRUSTED_SPREAD:
        caption += (
            f"\n[yellow]Equal runs took up to {spread:.1f}× as long as each other: something else "
            "keeps this machine busy. Don't trust these times; run again when it is idle.[/]"
        )
    table = Table(title=result.title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column()
    table.add_column("visual\ntokens", justify="right")
    table.add_column("first\ntoken", justify="right")
    table.add_column("peak\nmemory", justify="right")
    table.add_column("generated text")
    for name, count, side in (
        ("unpatched", f"{tokens}", result.unpatched),
        ("patched", f"{tokens} → {final_tokens}", result.patched),
    ):
        table.add_row(
            name,
            count,
            f"{side.prefill_seconds * 1000:.0f} ms",
            f"{side.peak_bytes / 2**20:.0f} MiB",
            Text(side.text),  # as it is: brackets are not markup here
        )
    return table


def layer_table(result: Comparison) -> Table:
    """Visual tokens before and after each layer that removes some."""
    counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for picture in result.report.pictures:
        for record in picture.layers:
            counts[record.stage, record.layer][0] += record.tokens_in
            counts[record.stage, record.layer][1] += record.tokens_out
    table = Table(title="visual tokens, layer by layer", title_justify="left")
    table.add_column("layer")
    for column in ("in", "out", "removed"):
        table.add_column(column, justify="right")
    for (stage, layer), (before, after) in counts.items():
        if after < before:
            name = {"vit": "encoder", "llm": "language model"}.get(stage, stage)
            table.add_row(f"{name} {layer}", f"{before}", f"{after}", f"{1 - after / before:.1%}")
    return table


def existing_file(value: str) -> Path:
    """A path given on the command line that has to be there."""
    path = Path(value)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{value} is not a file; check the path")
    return path


def parse_options() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Compare a vision-language model with and without illava.",
    )
    parser.add_argument("--model", help="name or folder of a checkpoint (default: random weights)")
    parser.add_argument("--image", type=existing_file, help="a picture (default: a photograph)")
    parser.add_argument("--video", type=existing_file, help="a video (default: a clip, made here)")
    parser.add_argument("--prompt", default="Describe what you see.", help="what to ask")
    parser.add_argument("--reduction", type=float, default=0.778, help="share of the visual tokens to remove")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="length of the answer")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16 on CUDA, float32 elsewhere",
    )
    return parser.parse_args()


def main() -> None:
    """Run the comparison and print it."""
    options = parse_options()
    on_cuda = options.device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_cuda else "float32"))
    console = Console()
    transformers_logging.disable_progress_bar()

    with TemporaryDirectory() as folder, console.status("loading the model") as status:
        name = options.model or tiny_checkpoint.build(Path(folder, "tiny"), **RANDOM_SHAPE)
        model = Model(name, options.device, dtype)
        image = photograph(options.image)
        clip = read_clip(options.video or write_clip(Path(folder, "clip.mp4")))

        console.print(f"{options.model or 'a small Qwen2.5-VL'} on {options.device}, {dtype}")
        if options.model is None:
            console.print(
                "[yellow]Its weights are random, so the text means nothing;[/] "
                "speed and memory are real. For real text: --model Qwen/Qwen2.5-VL-3B-Instruct"
            )
        pictures = {"image": {"images": [image]}, "video": clip}
        if getattr(model.processor, "video_processor", None) is None:
            console.print(f"The video is left out: {options.model} takes pictures only.")
            del pictures["video"]
        for kind, arguments in pictures.items():
            inputs = model.inputs(kind, options.prompt, **arguments)
            size = f"{image.width}×{image.height}" if kind == "image" else _clip_size(clip)
            result = compare(model, inputs, f"{kind}, {size}", options, status.update)
            console.print()
            console.print(result_table(result))
            console.print(layer_table(result))
    memory = "torch.cuda.max_memory_allocated" if on_cuda else "resident set of the process"
    console.print(
        f"\nfirst token: median of {options.runs} runs, both sides in turns; "
        f"peak memory: {memory}, growth up to the first token"
    )


def _clip_size(clip: Mapping[str, Any]) -> str:
    frames, height, width, _ = clip["videos"][0].shape
    return f"{frames} frames of {width}×{height}"


if __name__ == "__main__":
    try:
        main()
    except illava.IllavaError as error:  # its message says what to do; a traceback adds nothing
        raise SystemExit(f"illava: {error}") from error
