"""Draw the pictures and the clip that the web page ships: `python benchmarks/demo_samples.py`.

They are items of the readers' test split, which the small model of `checkpoints/` has never seen.
"""

from __future__ import annotations

from pathlib import Path

import av
from PIL import Image

from readers import tasks

FOLDER = Path(__file__).resolve().parent.parent / "illava" / "demo" / "samples"
# Name, task, number of the item: the readers' test split.
PICTURES = (("white", "find", 0), ("green", "find", 3), ("beside", "spatial", 1), ("writing", "text", 4))
SEVERAL = ("several", 5)
CLIP = ("video", 4)
CLIP_RATE = 24  # frames a second the reader was trained at


def main() -> None:
    """Write them and say what to ask of each."""
    FOLDER.mkdir(exist_ok=True)
    for name, task, number in PICTURES:
        item = tasks.held_out_item(task, "test", number)
        _save(item.pictures[0], f"{name}.jpg", item)
    item = tasks.held_out_item(SEVERAL[0], "test", SEVERAL[1])
    for number, pixels in enumerate(item.pictures, 1):
        _save(pixels, f"several_{number}.jpg", item)
    item = tasks.held_out_item(CLIP[0], "test", CLIP[1])
    with av.open(FOLDER / "clip.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_RATE, options={"crf": "12"})
        stream.height, stream.width = item.video.shape[1:3]
        stream.pix_fmt = "yuv420p"  # what browsers play
        for frame in item.video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    print(f"clip.mp4: {item.questions[0]}")


def _save(pixels, name: str, item: tasks.Item) -> None:
    Image.fromarray(pixels).save(FOLDER / name, quality=95, subsampling=0)
    print(f"{name}: {item.questions[0]}")


if __name__ == "__main__":
    main()
