"""The engine room: something that turns a call into an answer, and the only place that knows vLLM."""

from app.engine.base import Engine, EngineState, Phase

__all__ = ["Engine", "EngineState", "Phase"]
