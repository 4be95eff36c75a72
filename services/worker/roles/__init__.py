"""The roles a worker may host. Each is plain synchronous code that the device thread runs."""
