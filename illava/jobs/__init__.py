"""Large jobs: a folder of pictures or a JSONL file in, a file of JSON lines out, every item exactly once.

    from illava import jobs
    items = jobs.read_items("pictures/", prompt="What is in the picture?")
    summary = jobs.run(items, factory, "answers.jsonl", batch_size=8)

`factory()` is called once in every process that holds a model and returns `work(items) -> dicts`, one dict
for each item. Run the same lines again after a kill and the job goes on where it was. Needs neither torch
nor transformers itself.
"""

from illava.jobs.items import DEFAULT_PROMPT, Item, Items, Skipped, read_items
from illava.jobs.pictures import decode
from illava.jobs.results import Results
from illava.jobs.running import Summary, run

__all__ = [
    "DEFAULT_PROMPT",
    "Item",
    "Items",
    "Results",
    "Skipped",
    "Summary",
    "decode",
    "read_items",
    "run",
]
