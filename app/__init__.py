"""Refrain: serve your own fine-tuned model behind the OpenAI API, and never compute the same answer twice."""

__version__ = "0.1.0"
