"""Whose call the engine works on next, and whose it cannot take: bounds, classes, fairness, deadlines."""

from app.admission.admission import Admission, Turn

__all__ = ["Admission", "Turn"]
