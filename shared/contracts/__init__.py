"""All inter-process messages in one place. Contracts only grow; see ``catalog.py`` for who sends what to whom."""
