"""rheocast: the command line. Starts the embedded servers and the services, runs one clip, or serves the API.

It imports no service: it launches them as processes and talks to them over the broker like any platform would.
"""
