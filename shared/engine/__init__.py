"""The engine: the model and its plan, usable, testable and measurable without any broker."""
