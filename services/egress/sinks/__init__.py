"""Where frames go. ``port.py`` says what a sink is; ``opening.py`` picks one by the spec."""
