"""What the services share: contracts, bus, session store, tensors, telemetry and the engine."""
