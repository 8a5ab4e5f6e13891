"""The engine room: something that turns a call into an answer, and the only place that knows vLLM."""

from app.engine.base import Capacity, Engine, EngineState, Phase
from app.engine.cpu import compiles
from app.engine.meter import Meter
from app.engine.room import Room, room_for

__all__ = ["Capacity", "Engine", "EngineState", "Meter", "Phase", "Room", "compiles", "room_for"]
