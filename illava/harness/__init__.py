"""Patched models for evaluation harnesses, which find them by name.

`lmms_eval_model` is what lmms-eval runs as `--model illava`; `vlmevalkit` makes a model of VLMEvalKit.
"""
