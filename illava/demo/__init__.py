"""A web page on which the same model answers with and without illava.

    illava demo --model Qwen/Qwen2.5-VL-3B-Instruct

or, from Python, `illava.demo.launch("Qwen/Qwen2.5-VL-3B-Instruct").wait()`. Needs `illava[demo]`.
"""

from illava.demo.server import Server, launch

__all__ = ["Server", "launch"]
