"""Where frames come from. ``port.py`` says what a source is; ``opening.py`` picks one by the spec."""
