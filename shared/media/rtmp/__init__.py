"""RTMP as both ends speak it: chunks of messages, and the values in commands."""
