"""The whole system measured, as processes on real servers: ``python -m bench.system WHAT [--json]``, see ``--help``."""
