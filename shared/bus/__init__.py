"""The bus: typed messages over NATS or in memory, behind one port. Subjects and messages are those of the catalog."""
