"""OpenTelemetry, exported over OTLP/HTTP only when an endpoint is configured; otherwise it costs next to nothing."""
