"""The services. Each is a package run as ``python -m services.<name>``; none imports another."""
